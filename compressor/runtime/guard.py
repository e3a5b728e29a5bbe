"""The sentence in config.json that keeps a packed folder from being loaded without this package.

Transformers drops `transformers_weights` whenever it writes a config, so a folder whose config was
edited and saved again would load with random weights where this package is not imported.
"""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compressor.checkpoint.packed_config import GUARD, QUANT_METHOD


def keep() -> None:
    """Have every config file that transformers writes of a packed model carry the sentence.

    All its ways of writing one (of a model, of a config alone, to the Hub) go through
    `to_json_file`. Nothing is kept on the config of a live model: it stays plain data.
    """
    write = PreTrainedConfig.to_json_file

    @wraps(write)
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **options: Any) -> None:
        write(self, json_file_path, *args, **options)
        described = getattr(self, "quantization_config", None)
        described = described if isinstance(described, dict) else vars(described or object)
        if described.get("quant_method") == QUANT_METHOD:
            path = Path(json_file_path)
            config = {**json.loads(path.read_text(encoding="utf-8")), "transformers_weights": GUARD}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    PreTrainedConfig.to_json_file = to_json_file
