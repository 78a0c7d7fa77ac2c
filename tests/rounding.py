"""Another processor, emulated: results that differ in their last bit.

Which instructions a processor has, how many threads share a sum and which library
multiplies matrices decide the last bits of a float, and nothing else. Here they are
changed on purpose, by a function of the result's own bits: the same input still gives
the same output, as it does on one machine.

    with Rounding(1):
        ...                       # the result of each operation; some times slower

    round_updates_otherwise(1)    # the weights after each update of an optimizer
"""

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# What moves numbers, or picks them, rounds nothing.
EXACT = {
    *("abs", "amax", "arange", "bernoulli", "cat", "clamp", "clamp_min", "clone"),
    *("constant_pad_nd", "copy", "embedding", "empty", "empty_like"),
    *("empty_strided", "expand", "eye", "fill", "flip", "full", "full_like"),
    *("gather", "im2col", "index", "index_select", "lift_fresh"),
    *("masked_fill", "max", "native_dropout", "neg", "new_empty"),
    *("new_empty_strided", "new_full", "new_ones", "new_zeros", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "random", "randperm", "relu"),
    *("repeat", "roll", "scalar_tensor", "select_backward"),
    *("select_scatter", "slice_backward", "slice_scatter", "sort", "stack"),
    *("topk", "tril", "triu", "unfold", "where", "zero", "zeros", "zeros_like"),
}


@torch.no_grad()
def nudge_(t: Tensor, machine: int) -> None:
    """Change numbers by a unit or two in the last place, or not, each by its bits."""
    if t.is_nested:
        for part in t.unbind():
            nudge_(part, machine)
        return
    bits = t.view(INTEGERS[t.element_size()]).long() + machine
    unit = (bits * 6364136223846793005 >> 33) % 3 - 1  # -1, 0 or 1
    t.mul_(1 + torch.finfo(t.dtype).eps * unit.to(t.dtype))


class Rounding(TorchDispatchMode):
    """Compute as another machine would.

    Args:
        machine: which one.
    """

    def __init__(self, machine: int) -> None:
        super().__init__()
        self.machine = machine

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = [value.alias_info for value in func._schema.returns]
        computes = (
            func.namespace == "aten"
            and func._schema.name.removeprefix("aten::").rstrip("_") not in EXACT
            and all(alias is None or alias.is_write for alias in returned)  # no view
        )
        for t in out if isinstance(out, tuple | list) else (out,):
            if computes and isinstance(t, Tensor) and t.is_floating_point():
                nudge_(t, self.machine)
        return out


def round_updates_otherwise(machine: int):
    """Let every optimizer's weights come out differently in their last bit.

    Over a training that grows as other rounding does, and costs next to nothing.

    Returns:
        A handle whose `remove()` ends it.
    """

    @torch.no_grad()
    def hook(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:  # rows that nothing used stay as they are
                    other = p.clone()
                    nudge_(other, machine)
                    p.copy_(torch.where(p.grad == 0, p, other))

    return register_optimizer_step_post_hook(hook)
