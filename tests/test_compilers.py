"""What others do to a module: compile, export, map, cast, move and copy it."""

import copy
import pickle
import shutil
import sys

import pytest
import torch
from models import IMAGES, MODELS, SEQ2SEQ, example, images, randomise, tokens
from torch import nn

from minivit import MultiHeadAttention, SinusoidalPositions, Transformer, ViT
from minivit.attention import attention

each_model = pytest.mark.parametrize("name", MODELS)
a_few = pytest.mark.parametrize("name", ["vit", "transformer", "attention", "decoder"])
BATCH = torch.export.Dim("batch", min=2, max=64)


def same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def without_dropout(model):
    """Random numbers differ between backends."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, MultiHeadAttention):
            module.dropout = 0.0
    return model


def gradients(output, model):
    return torch.autograd.grad(output.square().sum(), list(model.parameters()))


# --- torch.compile -----------------------------------------------------------------


@a_few
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_compile_makes_one_graph(name, mode):
    torch._dynamo.reset()
    model, inputs = example(name, mode=mode)
    compiled = torch.compile(
        without_dropout(model), fullgraph=True, backend="aot_eager"
    )
    expected, found = model(*inputs), compiled(*inputs)
    same(found, expected)
    for a, b in zip(gradients(found, model), gradients(expected, model), strict=True):
        same(a, b, 1e-4)


def test_compile_attention_with_a_mask():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    q, mask = torch.randn(2, 3, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    for found, expected in zip(
        compiled(q, q, q, mask=mask), attention(q, q, q, mask=mask), strict=True
    ):
        same(found, expected)


def test_compile_to_machine_code():
    """The default backend, once: it needs a C compiler."""
    compilers = ["cl"] if sys.platform == "win32" else ["cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        pytest.skip("no C compiler on this machine")
    torch._dynamo.reset()
    model, inputs = example("attention")
    with torch.no_grad():
        same(torch.compile(model, fullgraph=True)(*inputs), model(*inputs))


# --- torch.export and ONNX ---------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "vit-mean", "transformer"])
def test_export(name):
    model, inputs = example(name)
    program = torch.export.export(model, inputs)
    same(program.module()(*inputs), model(*inputs))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_export_with_a_free_batch_size_and_dropped_paths(mode):
    model, inputs = example("vit-drop-path", mode=mode)
    program = torch.export.export(model, inputs, dynamic_shapes=({0: BATCH},))
    assert program.module()(images(3)).shape == (3, IMAGES["num_classes"])


def test_export_with_a_free_batch_size():
    model, inputs = example("vit")
    program = torch.export.export(model, inputs, dynamic_shapes=({0: BATCH},))
    for size in (2, 7):
        x = images(size)
        same(program.module()(x), model(x))


@pytest.mark.parametrize("name", ["vit", "transformer"])
def test_onnx_with_a_free_batch_size(name, tmp_path):
    import onnxruntime

    model, inputs = example(name)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        inputs,
        str(file),
        dynamo=True,
        verbose=False,
        dynamic_shapes=tuple({0: BATCH} for _ in inputs),
    )
    session = onnxruntime.InferenceSession(str(file))
    names = [given.name for given in session.get_inputs()]
    for repeat in (1, 3):
        x = [torch.cat([part] * repeat).roll(1, 0) for part in inputs]
        arrays = [part.numpy() for part in x]
        (found,) = session.run(None, dict(zip(names, arrays, strict=True)))
        same(torch.from_numpy(found), model(*x))


# --- torch.func --------------------------------------------------------------------


@each_model
def test_vmap_over_samples(name):
    """One sample at a time, all at once: as in per-sample gradients."""
    model, inputs = example(name)
    alone = [part[:, None] for part in inputs]  # (B, 1, ...)
    found = torch.vmap(model)(*alone)
    same(found[:, 0], model(*inputs))


def test_vmap_over_models():
    """An ensemble: the same images through several sets of weights."""
    models = [example("vit", seed)[0] for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = images(2)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    found = torch.vmap(call)(parameters, buffers)
    same(found, torch.stack([model(x) for model in models]))


def test_gradients_of_each_sample():
    model, (x,) = example("vit")
    labels = torch.tensor([0, 2])

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return nn.functional.cross_entropy(logits, label[None])

    parameters = dict(model.named_parameters())
    each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    nn.functional.cross_entropy(model(x), labels).backward()
    for name, parameter in parameters.items():
        same(each[name].mean(0), parameter.grad)


# --- numbers and memory --------------------------------------------------------------


@each_model
def test_double_precision(name):
    model, inputs = example(name)
    expected = model(*inputs)
    double = [x.double() if x.is_floating_point() else x for x in inputs]
    same(model.double()(*double).float(), expected, 1e-4)


@each_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name, dtype):
    model, inputs = example(name)
    expected = model(*inputs)
    half = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    found = model.to(dtype)(*half)
    assert found.dtype == dtype
    same(found.float(), expected, 0.1)


@each_model
def test_autocast(name):
    model, inputs = example(name)
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs)
    same(found.float(), expected, 0.1)


@each_model
def test_deepcopy(name):
    """A copy answers alike and shares nothing, but for what is tied."""
    model, inputs = example(name)
    twin, expected = copy.deepcopy(model), model(*inputs)
    randomise(model, seed=1)
    assert torch.equal(twin(*inputs), expected)
    assert len(list(twin.parameters())) == len(list(model.parameters()))


def test_other_layouts_of_images():
    model, (x,) = example("vit")
    expected = model(x)
    same(model(x.to(memory_format=torch.channels_last)), expected)
    same(model(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
    same(model(torch.cat([x, x], dim=3)[..., : x.size(3)]), expected)


@each_model
def test_pickle(name):
    """As `torch.save` of a whole model does, and a process that is handed one."""
    model, inputs = example(name)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(*inputs), model(*inputs))
    assert len(list(twin.parameters())) == len(list(model.parameters()))


@each_model
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_from_meta_to_weights(name, assign):
    """A large model is built without memory and then filled; no table is forgotten."""
    model, inputs = example(name)
    with torch.device("meta"):
        empty = MODELS[name][0]().eval()
    if not assign:
        empty.to_empty(device="cpu")
        for buffer in empty.buffers():
            buffer.fill_(torch.nan)  # what to_empty gives may be anything
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(*inputs), model(*inputs))
    assert len(list(empty.parameters())) == len(list(model.parameters())), "untied"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_dtype_are_assigned(dtype):
    model, inputs = example("transformer")
    weights = {k: v.to(dtype) for k, v in model.state_dict().items()}
    expected = model(*inputs)
    model.load_state_dict(weights, assign=True)
    same(model(*inputs).float(), expected, 0.1)


def test_positions_are_reset_in_their_dtype():
    positions = SinusoidalPositions(5, 4).half()
    expected = positions.table.clone()
    positions.table.fill_(torch.nan)
    positions.load_state_dict({})
    assert torch.equal(positions.table, expected)


# --- gradient checkpointing ----------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "vit-drop-path", "transformer"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_checkpointing_changes_nothing(name, mode):
    """The same dropout is drawn again on the way back."""
    model, inputs = example(name, mode=mode)

    def outcome():
        torch.manual_seed(1)
        output = model(*inputs)
        return output, gradients(output, model)

    expected = outcome()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    same(outcome(), expected, 1e-6)


@pytest.mark.parametrize("build", [ViT, Transformer])
def test_gradient_checkpointing_keeps_less(build):
    """Of what the layers compute, only their inputs wait for the way back."""

    def kept(flag):
        sizes = IMAGES if build is ViT else SEQ2SEQ
        model = build(**sizes | {"num_layers": 6}, gradient_checkpointing=flag)
        x = (images(2),) if build is ViT else (tokens(2, 9), tokens(2, 9))
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*x)
        return total

    assert kept(True) < 0.3 * kept(False)
