"""Properties that hold for any weights, and what the checkers share."""

import contextlib
import copy
import inspect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import MultiHeadAttention
from ..attention import causal_mask as _causal_mask
from .report import (
    MASK_LINE,
    Finding,
    Found,
    close,
    max_abs,
    negligible,
    seed_all,
)


def check_means(mask_means: str) -> None:
    if mask_means not in ("look", "hide", "add"):
        raise ValueError(
            f"mask_means must be 'look' or 'hide' or 'add', got {mask_means!r}"
        )


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def change_of(x: Tensor) -> Tensor:
    """Make a change that no normalisation removes, of the shape of x."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)


def changed_at(x: Tensor, tokens: int | slice) -> Tensor:
    """Copy x (B, L, E) with a change in some tokens."""
    other = x.clone()
    other[:, tokens] += change_of(other[:, tokens])
    return other


def copy_of(module: Any) -> Any:
    """Copy a module, also one that keeps tensors of its last call as attributes.

    Raises:
        Found: it cannot be copied, or the copy would share its weights.
    """
    with copying():
        tensors, functions = _not_copied(module)
        memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors}
        memo |= {id(f): _with_own_cells(f) for f in functions}
        copied = copy.deepcopy(module, memo)
        for f in functions:
            for cell in memo[id(f)].__closure__:
                content = cell.cell_contents
                cell.cell_contents = memo.get(id(content), content)
        if _memory_of(copied) & _memory_of(module):
            raise TypeError("the copy shares weights with the module itself")
    return copied


@contextlib.contextmanager
def copying() -> Iterator[None]:
    """Say of any error that it is the copying that fails, not the user's code."""
    try:
        yield
    except Found:
        raise
    except Exception as error:
        raise Found(
            Finding(
                "copy",
                "the checker cannot copy this module, and checks nothing else",
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                "what it keeps besides weights and modules, its __deepcopy__, weights "
                "that have no numbers yet",
            )
        ) from error


def _not_copied(module: nn.Module) -> tuple[list[Tensor], list[FunctionType]]:
    """Find, wherever the module keeps them, what deepcopy refuses or leaves as it is.

    That is tensors that an operation made, and functions such as `lambda x:
    self.head(x)`, whose closures hold the module itself.
    """
    pending: list[Any] = [module]
    seen: set[int] = set()
    tensors: list[Tensor] = []
    functions: list[FunctionType] = []
    while pending:
        value = pending.pop()
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not value.is_leaf:
                tensors.append(value)
        elif isinstance(value, FunctionType):
            if value.__closure__:
                functions.append(value)
        elif isinstance(value, Mapping):
            pending.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            pending.extend(value)
        else:
            pending.extend(getattr(value, "__dict__", {}).values())
    return tensors, functions


def _with_own_cells(f: FunctionType) -> FunctionType:
    """Copy a function, so that what its closure holds can be replaced."""
    cells = tuple(CellType(cell.cell_contents) for cell in f.__closure__ or ())
    copied = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, cells)
    copied.__kwdefaults__ = f.__kwdefaults__
    copied.__dict__.update(f.__dict__)
    return copied


def _memory_of(module: nn.Module) -> set[int]:
    """Where the numbers of its parameters and buffers lie."""
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors} - {0}


def moved_copy(module: Any) -> Any:
    """Copy a module in eval mode, with every weight moved a little.

    The user's module stays as it is; weights that begin at zero wake up. Matrices that
    are large, beside what keeps the size of what passes, are brought to that size:
    where they saturate a softmax, rounding decides which weights have a gradient.

    Raises:
        Found: it cannot be copied, or a weight is no finite number.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected an nn.Module, got {type(module).__name__}: put a function into "
            "the forward of a module that owns what it uses"
        )
    own = copy_of(module)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad(), copying():
        own.float().cpu().eval()
        for name, p in weights_of(own):
            if not p.isfinite().all():
                raise Found(
                    Finding(
                        "weights",
                        f"{name} holds NaN or infinite numbers",
                        "whatever they meet becomes NaN; nothing else is checked",
                        f"how {name} begins, or the training that made it",
                    )
                )
            size = (
                p.square().mean().sqrt() * math.sqrt(p.size(-1)) if p.ndim >= 2 else 1
            )
            if size > 1.5:
                p.div_(size)
            # at least a tenth of what fan-in scaling gives, for zeros and LayerScale
            spread = 0.3 / math.sqrt(p.size(-1)) if p.ndim >= 2 else 0.1
            p.add_(torch.randn(p.shape, generator=g) * spread)
            p.requires_grad_()
    return own


def weights_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name the parameters that can be learned; integers cannot."""
    return [(n, p) for n, p in module.named_parameters() if p.is_floating_point()]


def in_double(own: Any, trial: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Any:
    """Turn a module's copy and its inputs to float64, where rounding decides nothing.

    They stay as they are, in float32, where that cannot be: code that makes numbers of
    a type of its own, or a model so large that it would take too long. Not all such
    code raises: some of torch's fused kernels misread a float32 mask beside float64
    queries (eight keys, without AVX-512, torch 2.14). So both copies must agree.

    Args:
        own: the copy.
        trial: called with the module and the inputs, calls it in every way that the
            checks will; returns the outputs.
        inputs: float32.

    Returns:
        The module and the inputs.
    """
    if is_large(own):
        return own, *inputs
    try:
        with torch.no_grad():
            with Narrowing() as narrowing:
                plain = trial(own, *inputs)
            if narrowing.least < 4:
                widen(own)
                plain = trial(own, *inputs)
            exact, doubles = copy_of(own).double(), [x.double() for x in inputs]
            with Narrowing() as narrowing:
                pairs = zip(trial(exact, *doubles), plain, strict=True)
            alike = [
                close(a.float().nan_to_num(), b.nan_to_num(), 1e-3) for a, b in pairs
            ]
    except Exception:  # of any kind: the checks will say it of the module as it is
        return own, *inputs
    serves = all(alike) and narrowing.least == 8
    return (exact, *doubles) if serves else (own, *inputs)


def exact_inputs(trial: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Keep a function's inputs in float64, or turn them to float32 where that fails."""
    try:
        with torch.no_grad(), Narrowing() as narrowing:
            trial(*inputs)
    except Exception:  # of any kind: the checks will say it of float32
        return [x.float() for x in inputs]
    return [x.float() for x in inputs] if narrowing.least < 8 else list(inputs)


class Narrowing(TorchDispatchMode):
    """See to how many bytes any operation narrows the floats that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.least = 8

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        size = bytes_of(out[0] if isinstance(out, tuple | list) and out else out)
        if 0 < size < max(map(bytes_of, args), default=0):
            self.least = min(self.least, size)
        return out


def bytes_of(a: Any) -> int:
    """Size of a float in a tensor, zero for whatever is none, single numbers too."""
    is_one = isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 0
    return a.element_size() if is_one else 0


class Widened(TorchDispatchMode):
    """Turn nothing to half precision: eight bits say too little of a right answer."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        to_half = kwargs.get("dtype") in (torch.float16, torch.bfloat16)
        if func is torch.ops.aten._to_copy.default and to_half:
            kwargs["dtype"] = args[0].dtype
        return func(*args, **kwargs)


def widen(own: nn.Module) -> None:
    """Let a module, and all copies of it, run so while they are not in half precision.

    Hooks do it, because a copy keeps them.
    """
    entered: list[contextlib.AbstractContextManager[Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        in_half = dtype_of(module).itemsize < 4
        entered.append(contextlib.nullcontext() if in_half else Widened())
        entered[-1].__enter__()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        entered.pop().__exit__(None, None, None)

    own.register_forward_pre_hook(enter)
    own.register_forward_hook(leave, always_call=True)


def is_large(own: nn.Module) -> bool:
    return sum(p.numel() for p in own.parameters()) > 20_000_000


def dtype_of(own: Any) -> torch.dtype:
    return next((p.dtype for _, p in weights_of(own)), torch.float32)


def without_positions(own: Any, *, tokens: bool = False) -> Any:
    """Copy a model with its tables of positions at zero; None if it shows none.

    With `tokens`, class tokens and their like are set to zero as well.
    """
    names = ("pos", "cls", "token") if tokens else ("pos",)
    plain = copy_of(own)
    tables = [
        t
        for name, t in [*plain.named_parameters(), *plain.named_buffers()]
        if any(part in name.rsplit(".", 1)[-1] for part in names)
        and t.is_floating_point()
        and t.ndim >= 2
    ]
    with torch.no_grad():
        for t in tables:
            t.zero_()
    return plain if tables else None


def eval_copy(model: Any, dtype: torch.dtype) -> Any:
    """Copy a module with its weights as they are, in eval mode."""
    if isinstance(model, nn.Module):
        return copy_of(model).to("cpu", dtype).eval()
    return model


def tensor_in(result: Any) -> Tensor:
    """Find the tensor in what a model returns."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "logits"):
        return result.logits
    if isinstance(result, Mapping):
        return result["logits"] if "logits" in result else next(iter(result.values()))
    return result[0]


def flip(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def mask_as(mask: Tensor, means: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn a mask, True = may look, into what the user's code takes."""
    if means == "add":
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    return mask if means == "look" else ~mask


@dataclass(frozen=True)
class Masking:
    """How the user's module takes its masks.

    Attributes:
        means: "look", "hide" or "add".
        dims: 2 for (L, S), 3 for (B, L, S), 4 for (B, 1, L, S).
    """

    means: str
    dims: int = 2

    def argument(
        self, name: str | None, mask: Tensor | None, of: Any, query: Tensor, keys: int
    ) -> dict[str, Tensor]:
        """Make the argument; if it must be given and is not, one that hides nothing."""
        if name is None:
            return {}
        if mask is None:
            known = inspect.signature(getattr(of, "forward", of)).parameters
            if name not in known or known[name].default is not inspect.Parameter.empty:
                return {}
            mask = torch.ones(query.size(1), keys, dtype=torch.bool)
        if self.dims > 2:
            mask = mask.expand(query.size(0), *mask.shape[-2:])  # (B, L, S)
        if self.dims > 3:
            mask = mask[:, None]  # (B, 1, L, S)
        return {name: mask_as(mask, self.means, query.dtype)}


def size_of(module: Any, name: str, given: int | None) -> int:
    found = getattr(module, name, None) if given is None else given
    if found is None and name == "num_classes":
        found = getattr(getattr(module, "head", None), "out_features", None)
    if not isinstance(found, int):
        raise ValueError(f"{name} is needed: the module has no such attribute")
    return found


def width_of(module: nn.Module) -> int:
    for p in module.parameters():
        if p.ndim >= 2:
            return p.size(-1)
    raise ValueError("embed_dim is needed: the module has no matrix to read it from")


def wrong_shape(got: Tensor, want: tuple[int, ...]) -> Finding | None:
    if tuple(got.shape) == want:
        return None
    return Finding(
        "shape",
        f"the output has shape {tuple(got.shape)}",
        f"expected {want}",
        "the last reshape, and the axes of every transpose",
    )


def changed_in_place(fn: Callable[..., Any], *inputs: Tensor) -> Finding | None:
    given = [t.clone() for t in inputs]
    fn(*given)
    if all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        return None
    return Finding(
        "in place",
        "an input tensor was changed",
        "something is computed in place",
        "+=, *= and methods that end in _",
    )


def not_repeatable(
    call: Callable[[], Tensor],
    other: Callable[[], Any] | None = None,
    own: Any = None,
) -> Finding | None:
    """Repeat a call, often enough to meet what happens to one sample in ten."""
    times = 3 if own is not None and is_large(own) else 20
    with torch.no_grad():
        before = call()
        if not all(close(before, call(), 1e-4) for _ in range(times)):
            return Finding(
                "repeatable",
                "the same input gives another output the second time, in eval mode",
                "dropout is active in eval mode, or state is carried between calls",
                "F.dropout without training=self.training; attributes set in forward",
            )
        if other is not None:
            other()
            if not close(before, call(), 1e-4):
                return Finding(
                    "repeatable",
                    "a call changes the result of a later one",
                    "state is carried between calls",
                    "attributes set in forward",
                )
    return None


def place_finding() -> Finding:
    return Finding(
        "batch",
        "a sample's output depends on its place in the batch",
        "positions run over the batch, x.size(0), instead of over the tokens",
        "where positions are added; batch_first",
    )


@torch.no_grad()
def batch_leak(
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    changed: Tensor | None = None,
    *,
    alone: bool = True,
) -> Finding | None:
    """Look for samples that depend on others or, if `alone`, on their place."""
    other = x.clone()
    other[1:] = x[1:] * 0.5 + 1.0 if changed is None else changed[1:]
    out = call(x)
    if close(out[0], call(other)[0], 1e-4):
        same = not alone or close(call(x.flip(0)), out.flip(0), 1e-4)
        return None if same else place_finding()
    return Finding(
        "batch",
        "a sample's output changes when another sample of the batch changes",
        "batch and length are exchanged (batch_first=True missing?), a reshape mixes "
        "them, or a softmax or norm runs over the batch",
        "batch_first, every reshape, the axes of softmax and norm",
    )


@torch.no_grad()
def order_matters(call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    order = torch.tensor([2, 0, 4, 1, 3])
    if close(call(x)[:, order], call(x[:, order]), 1e-4):
        return None
    # Positions inside the scores (rotary, biases, a causal mask) are no mistake: they
    # cannot show where all tokens are alike, because then all mixtures are.
    alike = x[:, :1].expand_as(x).contiguous()
    if close(call(alike), call(x[:, :1]).expand_as(x), 1e-4):
        return None
    return Finding(
        "order",
        "reordering the tokens does more than reorder the output",
        "a reshape mixes positions and heads: split with unflatten and transpose, "
        "merge with transpose and flatten",
        "the reshapes around the heads",
    )


def mask_finding(hidden_ok: Tensor, visible_ok: Tensor) -> Finding | None:
    hidden, visible = bool(hidden_ok.all()), bool(visible_ok.all())
    if hidden and visible:
        return None
    cause = {
        (False, False): "the mask is inverted: True and False are exchanged",
        (False, True): "the mask is not applied, or not to the keys",
        (True, False): "the mask hides more than it should",
    }[hidden, visible]
    return Finding(
        "mask",
        "a hidden key changes the output" if not hidden else "a visible key does not",
        cause,
        MASK_LINE,
    )


def hidden_in_maps(weights: Tensor | None) -> Finding | None:
    """Look for weight on future keys in maps (..., L, L) made with a causal mask."""
    if weights is None:
        return None
    future = ~_causal_mask(weights.size(-1))
    if bool((weights.detach()[..., future].abs() < 1e-6).all()):
        return None
    return Finding(
        "map",
        "the attention maps show keys that are hidden",
        "the maps are collected without the mask",
        "where the maps are collected",
    )


def leak_finding(training: bool) -> Finding:
    mode = "train" if training else "eval"
    return Finding(
        "causality",
        f"in {mode} mode the past changes when the future changes",
        "there is no causal mask, it is inverted, or it is left out in this mode; or a "
        "norm runs over the tokens",
        "where the causal mask is made and whether it depends on self.training",
    )


@torch.no_grad()
def always_differ(
    call: Callable[[Any, Any], Tensor], own: Any, a: Any, b: Any, training: bool
) -> bool:
    """Whether two inputs give two outputs, whatever chance does.

    Each call gets a fresh copy in train or eval mode, and fresh seeds. What is random
    beyond those differs for one and the same input too: nothing is said of that.
    """

    def out(x: Any) -> Tensor:
        m = copy_of(own).train(training)
        seed_all(1)
        return call(m, x)

    first, second = out(a), out(b)
    return not close(first, second, 1e-4) and all(
        close(first, out(a), 1e-4) and close(second, out(b), 1e-4) for _ in range(8)
    )


@torch.no_grad()
def future_leak(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    """Call it with a causal mask, as call(module, x, mask), and change the future."""
    mask = _causal_mask(x.size(1))
    for training in (False, True):
        for t in (1, 3):

            def past(m: Any, x: Tensor, t: int = t) -> Tensor:
                return call(m, x, mask)[:, :t]

            if always_differ(past, own, x, changed_at(x, slice(t, None)), training):
                return leak_finding(training)
    last, other = call(own, x, mask)[:, -1], call(own, changed_at(x, 0), mask)[:, -1]
    if close(last, other, 1e-6):
        return Finding(
            "causality",
            "the last token does not change with the first",
            "the mask hides the past",
            MASK_LINE,
        )
    return None


def in_half(
    call: Callable[..., Tensor], m: Any, *inputs: Tensor, dtype: torch.dtype
) -> Tensor:
    """Call in half precision; where types mix inside, let autocast do the rest.

    What autocast does with code that nobody wrote for it is not for us to judge: where
    it fails too, an empty tensor comes back.
    """
    given = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    try:
        return call(m, *given)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("dtype", "scalar type")):
            raise
    try:
        with torch.autocast("cpu", dtype=dtype):
            return call(m, *given)
    except RuntimeError:
        return torch.empty(0, dtype=dtype)


@torch.no_grad()
def half_overflow(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    mask = _causal_mask(x.size(1))
    for dtype in (torch.bfloat16, torch.float16):
        m = copy_of(own).to(dtype)
        if not in_half(call, m, x, mask, dtype=dtype).isfinite().all():
            return Finding(
                "half",
                f"the output under a mask is not finite in {dtype}",
                "a constant is too large for half precision",
                "the value that hidden scores are filled with",
            )
    return None


def another(x: Tensor, number: int) -> Tensor:
    """Make other inputs of a larger batch; number 0 is the given one."""
    if number == 0:
        return x
    g = torch.Generator().manual_seed(number)
    return torch.randn(32, *x.shape[1:], generator=g).to(x.dtype)


def unreached(
    own: Any, call: Callable[[int], Tensor], *, tables: bool = True, part: int = 0
) -> Finding | None:
    """Look for weights, or rows of weights, that get no gradient.

    Shifts and gains are not judged one by one. A shift may do nothing by right: one
    that is added to all keys moves all scores of a query alike, and the softmax takes
    that away. What one input does not reach, others may: an expert that no token chose.

    Args:
        own: the module.
        call: runs it on an input of that number.
        tables: look at the rows of tables of positions.
        part: of a linear map, 1 / part of the rows may die by chance, as with ReLU.
    """
    out = call(0)
    known = {id(p) for p in own.parameters()}
    if any(id(leaf) not in known for leaf in leaves(out)):
        return Finding(
            "registered",
            "weights take part that model.parameters() does not list",
            "they are in a plain list or dict, or made in forward: no optimiser and no "
            "state_dict knows them",
            "lists of layers: nn.ModuleList; single weights: nn.Parameter",
        )
    sizes = gradient_sizes(own, out)
    finding = without_gradient(own, sizes, tables, part)
    for number in (1, 2, 3):
        if finding is None:
            return None
        more = gradient_sizes(own, call(number))
        sizes = {name: total(size, more[name]) for name, size in sizes.items()}
        finding = without_gradient(own, sizes, tables, part)
    return finding


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    if b is None:
        return a
    return a + b


def without_gradient(
    own: nn.Module, gradients: dict[str, Tensor | None], tables: bool, part: int
) -> Finding | None:
    """Look for weights, or rows of them, whose gradients are zero."""
    maps = {id(m.weight) for m in own.modules() if isinstance(m, nn.Linear)}
    maps |= {id(p) for n, p in own.named_parameters() if "in_proj" in n}
    largest = max((max_abs(g) for g in gradients.values() if g is not None), default=0)
    for name, p in weights_of(own):
        if "mask_token" in name:
            continue  # serves pre-training only
        gradient = gradients[name]
        if gradient is None:
            symptom = f"no gradient reaches {name}"
            cause = "it is never used, or the graph is cut (detach, .data, no_grad)"
            return Finding("gradients", symptom, cause, f"where {name} is used")
        if is_vector(p) or is_shift(name) or not p.numel():
            continue
        if negligible(gradient, largest).all():
            symptom = f"the gradient of {name} is zero everywhere"
            cause = "what it makes is thrown away or multiplied by zero"
            return Finding("gradients", symptom, cause, f"where {name} is used")
        rows = gradient.flatten(0, -2).sum(-1)
        dead = negligible(rows, largest).nonzero().flatten().tolist()
        finding = (tables and unused_positions(name, p, len(rows), dead)) or (
            id(p) in maps and left_out(name, len(rows), dead, part)
        )
        if finding:
            return finding
    return None


def unused_positions(
    name: str, p: Tensor, rows: int, dead: list[int]
) -> Finding | None:
    """Blame a table of positions for rows that nobody reads.

    One that is much too long is made for longer sequences.
    """
    is_table = "pos" in name and "rel" not in name and p.ndim in (2, 3)
    if not is_table or not dead or rows == 1 or 4 * len(dead) > rows:
        return None
    return Finding(
        "gradients",
        f"rows {dead[:4]} of {name} are never used",
        "a token gets no position: CLS joined after the positions were "
        "added, or the table is too long",
        f"where {name} is added",
    )


def left_out(name: str, rows: int, dead: list[int], part: int) -> Finding | None:
    """Blame a linear map for outputs that are not used, more than die by chance."""
    if len(dead) < 2 or part * len(dead) < rows:
        return None
    return Finding(
        "gradients",
        f"no gradient reaches {len(dead)} of the {rows} rows of {name}",
        "a part of what it makes is left out, as a head that is skipped",
        f"the slices, and the loop over heads, after {name}",
    )


def gradient_sizes(own: nn.Module, out: Tensor) -> dict[str, Tensor | None]:
    """Sum the sizes of each weight's gradients over several directions of the output.

    In a single direction a gradient may vanish by chance.
    """
    named = dict(weights_of(own))
    g = torch.Generator().manual_seed(0)
    sizes: dict[str, Tensor | None] = dict.fromkeys(named)
    for _ in range(3):
        direction = torch.randn(out.shape, generator=g).to(out.dtype)
        gradients = torch.autograd.grad(
            out, list(named.values()), direction, retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                sizes[name] = total(sizes[name], gradient.abs())
    return sizes


def leaves(out: Tensor) -> list[Tensor]:
    """Collect the weights at which the graph of a tensor ends."""
    pending, seen, found = [out.grad_fn], set(), []
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        pending.extend(parent for parent, _ in node.next_functions)
    return found


def repeated_layer(own: Any) -> Finding | None:
    """Look for lists that hold one and the same layer several times."""
    for name, m in own.named_modules():
        if isinstance(m, nn.ModuleList | nn.Sequential):
            heavy = [id(c) for c in m if next(c.parameters(), None) is not None]
            if len(set(heavy)) < len(heavy):
                return Finding(
                    "layers",
                    f"{name or 'a list'} holds one layer several times",
                    "[layer] * n repeats the same object: all share their weights",
                    "where the list is made: build a new layer for each place",
                )
    return None


def is_vector(p: Tensor) -> bool:
    """Whether it is a gain or a shift, such as (E,) or (1, 1, E), and no matrix."""
    return p.ndim < 2 or p.numel() == p.size(-1)


def is_shift(name: str) -> bool:
    return name.lower().endswith(("bias", "beta", "shift", "offset"))


def silence(own: nn.Module, *, matrices: bool = True) -> None:
    """Set gains to one, shifts to zero and, if asked for, matrices to zero."""
    for name, p in weights_of(own):
        if is_vector(p):
            p.fill_(0.0 if is_shift(name) and p.numel() > 1 else 1.0)
        elif matrices:
            p.zero_()


@torch.no_grad()
def no_activation(own: Any, call: Callable[[Any, float], Tensor]) -> Finding | None:
    """Without shifts, f(-x) = -f(x) holds for norm, attention and linear maps.

    Only the activation breaks it. `call` takes the module and a sign for its input.
    """
    plain = copy_of(own)
    for name, p in weights_of(plain):
        if is_shift(name) and is_vector(p) and p.numel() > 1:
            p.zero_()
    plus, minus = call(plain, 1.0), call(plain, -1.0)
    if not close(plus, -minus, 1e-4) or negligible(plus, 1.0).all():
        return None
    return Finding(
        "activation",
        "negating the input just negates the output",
        "there is no feed-forward network, or no activation (ReLU, GELU) between its "
        "two linear maps, so that they are one",
        "the feed-forward network",
    )


@torch.no_grad()
def lost_branch(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    """Zero one matrix at a time: that silences one branch, never all of them."""
    plain = copy_of(own)
    silence(plain, matrices=False)
    matrices = [p for _, p in weights_of(plain) if not is_vector(p)]
    silent = 0
    nothing = copy_of(plain)
    silence(nothing)
    rest = call(nothing, x)
    for p in matrices:
        kept = p.clone()
        p.zero_()
        silent += close(call(plain, x), rest, 1e-5)
        p.copy_(kept)
    if silent < 2 or silent == len(matrices):
        return None  # one matrix may be shared by all branches; no branch is lost
    return Finding(
        "residual",
        "silencing one branch silences the whole layer",
        "the second residual adds the layer's input again, not the sum after the "
        "attention: what the attention adds is lost",
        "the lines with x + …",
    )


@torch.no_grad()
def unnormalised(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    """Between pre-norm residuals, what is added does not grow with the input."""
    names = (name + type(m).__name__ for name, m in own.named_modules())
    if not any("norm" in name.lower() for name in names):
        return None
    plain = copy_of(own)
    near, far = (call(plain, c * x) for c in (1e3, 1e5))
    if max_abs(far) < 30 * max_abs(near):
        return None  # post-norm: the output does not grow with the input
    added, more = max_abs(near - 1e3 * x), max_abs(far - 1e5 * x)
    if more <= max(30 * added, 1e-6 * max_abs(far)):
        return None  # what is added is normalised, or nothing
    one = copy_of(plain)
    silence(one)
    if not close(call(one, x), x, 1e-3):
        return None
    return Finding(
        "norm",
        "what the branches add grows with the input, in a pre-norm layer",
        "a branch reads x itself, not the normalised x: often the keys and values",
        "the arguments of the attention: norm(x) for query, key and value",
    )


@torch.no_grad()
def broken_residual(own: Any, call: Callable[..., Tensor], x: Tensor) -> Finding | None:
    """With every matrix at zero the branches are silent: only the residual remains."""
    plain = copy_of(own)
    silence(plain, matrices=False)
    normal = call(plain, x)
    post_norm = bool((normal.square().mean(-1) - 1).abs().max() < 1e-2)
    silence(plain)
    out = call(plain, x)
    rms = x * x.square().mean(-1, keepdim=True).rsqrt()
    wants = (F.layer_norm(x, x.shape[-1:]), rms) if post_norm else (x,)
    if any(close(out, want, 1e-3) for want in wants):
        return None
    silent = bool((out - out.mean(-1, keepdim=True)).abs().max() < 1e-4)
    if silent:
        cause = "there is no residual connection around the branches"
    elif close(out, F.layer_norm(x, x.shape[-1:]), 1e-2):
        cause = "the residual adds the normalised input instead of the input itself"
    elif close(out, x.relu(), 1e-3) or bool((out >= 0).all()):
        cause = "an activation is applied to the sum; x must pass through unchanged"
    else:
        cause = "x does not pass through unchanged"
    return Finding(
        "residual",
        "with all matrices at zero the layer does not hand its input through",
        cause,
        "the lines with x + …",
    )


def probabilities(out: Tensor) -> Finding | None:
    sums = out.sum(-1)
    if (
        out.size(-1) > 1
        and bool((out >= 0).all())
        and close(sums, torch.ones_like(sums))
    ):
        return Finding(
            "logits",
            "the outputs are probabilities: they sum to one",
            "there is a softmax at the end; CrossEntropyLoss has its own",
            "the last line of forward",
        )
    return None


@torch.no_grad()
def bounded(own: Any, call: Callable[[Any], Tensor]) -> Finding | None:
    """Logits grow with the weights of the last map, unless something squashes them."""
    with LinearMaps() as maps:
        before = call(own)
    if not maps.number or before.size(-1) < 2:
        return None
    with LinearMaps(enlarged=maps.number):
        out = call(own)
    if bool(out.abs().max() <= 1.001) and not close(out, before):
        cause = "there is a softmax, sigmoid or tanh at the end"
    elif bool((out >= 0).all()) and bool((out == 0).any()):
        cause = "there is a ReLU at the end"
    else:
        return None
    return Finding(
        "logits",
        "the outputs are squashed: larger weights do not make larger logits",
        cause + "; CrossEntropyLoss expects plain logits",
        "the last line of forward",
    )


class LinearMaps(torch.overrides.TorchFunctionMode):
    """Count linear maps and convolutions; one may compute with enlarged weights.

    Those are new tensors: the map may belong to the user.

    Args:
        enlarged: which one, counted from one.
    """

    def __init__(self, enlarged: int = 0) -> None:
        super().__init__()
        self.enlarged = enlarged
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ):
        if func in (F.linear, torch.conv2d, F.conv2d) and len(args) > 1:
            self.number += 1
            if self.number == self.enlarged:
                args = (args[0], args[1] * 1e9, *args[2:])  # logits may begin tiny
        return func(*args, **(kwargs or {}))


def large_first_loss(logits: Tensor, read: Tensor | None = None) -> Finding | None:
    """Compare the loss with that of guessing, ln K, plus some slack.

    This judges the weights themselves. A usual beginning exceeds ln K by 0.1 to 0.9,
    a tied N(0, 1) embedding by 1.3 if 8 wide, by 4 to 10 if 24 wide.

    Args:
        logits: (..., K), of a model before training.
        read: the tokens just read (...), whose logits are left out: a head that is tied
            to the embedding first expects them again, the more so the wider it is.
    """
    flat = logits.detach().flatten(0, -2)
    if read is not None:
        mean = flat.mean(-1, keepdim=True)  # (B·L, 1)
        flat = flat.scatter(1, read.reshape(-1, 1), mean)
    loss = -float(flat.log_softmax(-1).mean())  # over each class as the target
    expected = math.log(flat.size(-1))
    if loss < expected + (1.5 if read is None else 1.1):
        return None
    return Finding(
        "first loss",
        f"before training the loss is {loss:.1f}; guessing gives ln K = {expected:.1f}",
        "the logits begin too large",
        "the initialisation of the head, a missing last norm",
    )


def cannot_overfit(
    model: Any, inputs: tuple[Tensor, ...], labels: Tensor
) -> Finding | None:
    """Train a copy on one batch: whatever can learn at all can learn that by heart."""
    own = copy_of(model).float().cpu().train()
    for _, p in weights_of(own):
        p.requires_grad_()
    large = is_large(own)
    # A large model is slow: it need not go as far, only clearly down.
    steps, lr, part = (12, 3e-4, 0.8) if large else (200, 2e-3, 0.5)
    learned = [p for _, p in weights_of(own)]
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    first = last = math.inf
    for step in range(steps):
        loss = loss_of(tensor_in(own(*inputs)), labels)
        last = loss.item()
        if step == 0:
            first = last
        if last < part * first:
            return None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return Finding(
        "overfit",
        f"after {steps} steps on one batch the loss is {last:.2f}, from {first:.2f}",
        "the model cannot learn even one batch by heart",
        "softmax before the loss, detached tensors, missing residual or norm",
    )


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.size(-1) == 1:  # yes or no
        yes = torch.arange(len(logits)) % 2.0
        return F.binary_cross_entropy_with_logits(logits[:, 0], yes)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def shown_weights(own: Any, x: Tensor, mask: dict[str, Any]) -> Tensor | None:
    """The attention maps that a module shows: by `attend`, or second in a tuple."""
    if isinstance(own, MultiHeadAttention):
        return own.attend(x, x, x, **mask)[1]
    result = own(x, x, x, **mask)
    if isinstance(result, tuple) and len(result) > 1 and isinstance(result[1], Tensor):
        return result[1]
    return None


def cached_decoding(own: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if not all(hasattr(own, name) for name in ("encode", "decode", "new_cache")):
        return None

    @torch.no_grad()
    def step(src: Tensor, tgt: Tensor) -> Tensor:
        memory, cache = own.encode(src), own.new_cache()
        logits = [
            own.decode(tgt[:, : t + 1], memory, src, cache=cache)[:, -1:]
            for t in range(tgt.size(1))
        ]
        return torch.cat(logits, dim=1)

    return step
