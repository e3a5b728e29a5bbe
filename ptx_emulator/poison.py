"""What nobody wrote is NaN, so that a kernel which leaves a part of its result out is noticed."""

import torch


def poison(patch):
    """Through `patch`, a MonkeyPatch, fill what `torch.empty` and `new_empty` give: NaN, or -1 in
    integers.
    """
    plain, plain_new = torch.empty, torch.Tensor.new_empty

    def filled(tensor):
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    patch.setattr(torch, "empty", lambda *args, **options: filled(plain(*args, **options)))
    patch.setattr(
        torch.Tensor, "new_empty", lambda *args, **options: filled(plain_new(*args, **options))
    )
