"""Chats: what the public datasets write them in, and the token ids of the model's own template."""

from __future__ import annotations

from typing import Any

from compressor.errors import DataError

Message = dict[str, Any]
"""`role` and `content`, and whatever else a template may read, such as `tool_calls`."""

_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_response": "tool", "observation": "tool",
}  # fmt: skip
# The day that templates which write today's date are given: the same input gives the same tokens
_DAY = {
    "%d": "26", "%m": "07", "%Y": "2024", "%y": "24", "%b": "Jul", "%B": "July", "%a": "Fri",
    "%A": "Friday", "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM", "%j": "208",
}  # fmt: skip


def messages_of(where: str, value: list[Any]) -> list[Message]:
    """A chat as `{"role": …, "content": …}` each, from that or from `from` and `value`.

    Args:
        where: names it in messages to people.
        value: the list that stands in a record.

    Raises:
        DataError: an entry that is neither, or holds something else than text.
    """
    return [_message(f"{where} entry {number}", entry) for number, entry in enumerate(value, 1)]


def _message(where: str, entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no object with `role` and `content`, or `from` and `value`")
    message = {key: value for key, value in entry.items() if value is not None}
    role = message.pop("from", None) if "role" not in message else message["role"]
    content = message.pop("value", None) if "content" not in message else message["content"]
    if not isinstance(role, str):
        raise DataError(
            f"{where} has no `role` (or `from`); its fields are {', '.join(entry)}"[:300]
        )
    if isinstance(content, list):  # parts of texts, pictures, …
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [text for text in parts if isinstance(text, str)]
        content = "".join(texts)
        if len(texts) < len(parts):
            raise DataError(f"{where} has `content` that is not all text; leave such chats out")
    if isinstance(content, str):
        message["content"] = content
    elif content is not None or "tool_calls" not in message:
        raise DataError(f"{where} has no text in `content` (or `value`)")
    return {**message, "role": _ROLES.get(role.lower(), role.lower())}


def token_ids(
    tokenizer: Any, messages: list[Message], tools: list[Any] | None, where: str
) -> list[int]:
    """The ids of a chat by the tokenizer's own template, nothing for one without any text.

    What the template writes as special tokens are special tokens; none is added to them.

    Raises:
        DataError: the tokenizer has no template, or it does not take this chat.
    """
    if not any(
        message.get("content", "").strip() or "tool_calls" in message for message in messages
    ):
        return []
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except Exception as error:  # none, or several and none of them for this
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{where} is a chat, but the model's tokenizer has no chat template: put a "
                "chat_template.jinja into the model's folder, or give texts"
            ) from None
        raise _refused(where, error) from None
    try:
        found = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=_on_one_day(template), return_dict=False
        )
    except Exception as error:  # whatever a template raises
        raise _refused(where, error) from None
    return list(found)


def _refused(where: str, error: Exception) -> DataError:
    said = " ".join(str(error).split())[:200]
    return DataError(f"{where} is not taken by the model's chat template: {said}")


def _on_one_day(template: str) -> str:
    """`template` with a date that does not change from day to day, if it asks for one."""
    if "strftime_now" not in template:
        return template
    day = "".join(f" | replace({code!r}, {value!r})" for code, value in _DAY.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{day} }}}}{{% endmacro %}}{template}"
