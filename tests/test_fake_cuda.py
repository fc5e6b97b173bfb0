"""What runs on a GPU, run on FakeTensorMode's cuda tensors: no GPU is needed, nothing is computed.

A tensor left on the CPU fails, and so does what makes the host wait for the GPU: .item(), .cpu(),
.tolist(), nonzero, a mask as an index. The backward pass is torch's own and needs a GPU: in its
place each leaf gets an empty gradient.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain
import probe
import segment

CUDA = torch.device("cuda", 0)


class NoCopyToHost(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten._fused_sgd_:  # has no fake kernel
            assert {x.device for part in args[:3] for x in part} == {CUDA}
            return None
        out = function(*args, **(kwargs or {}))
        before = [x.device.type for x in args if isinstance(x, Tensor)]
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            assert not (out.device.type == "cpu" and "cuda" in before), "the host waits for a copy"
        return out


def empty_gradients(loss: Tensor, **_: object) -> None:
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.empty_like(node.variable)
        nodes += [parent for parent, _ in node.next_functions]


@pytest.fixture
def fake_cuda(monkeypatch) -> Iterator[None]:
    """Within: tensors made with device="cuda" are fake ones; autocast is bf16, as on a GPU."""
    monkeypatch.setattr(Tensor, "backward", empty_gradients)
    pretrain.shifts.cache_clear()
    with FakeTensorMode(), NoCopyToHost():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        yield
        torch.set_autocast_enabled("cuda", False)
    pretrain.shifts.cache_clear()


def to_fake_cuda(module: nn.Module) -> nn.Module:
    """`module`, made outside the mode, with fake cuda tensors in place of its own."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, x in own.items():
                if x is not None:
                    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)
                    own[name] = nn.Parameter(y, x.requires_grad) if name in part._parameters else y
    return module


# Modules are fixtures before `fake_cuda`, in which first weights cannot be drawn.
# pretrain.py -------------------------------------------------------------------------------------
@pytest.fixture(params=[("single", 0.2), ("three", 0)], ids=["single, negatives", "three"])
def byol(request) -> pretrain.BYOL:
    mode, negatives = request.param
    encoder = pretrain.make_encoder("resnet18", pretrain.CHANNELS[mode])
    module = pretrain.BYOL(encoder, 16, 8, negatives)
    module.mode = mode
    return module.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_with_augmentation_stays_on_the_gpu_and_never_waits(
    byol, dtype, fake_cuda, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else no loss is scaled
    torch.set_autocast_dtype("cuda", dtype)
    args = pretrain.make_parser().parse_args(["--mode", byol.mode, "--size", "64"])
    channels = pretrain.CHANNELS[byol.mode]
    to_fake_cuda(byol)
    optimizer = pretrain.make_optimizer(byol, args)
    x, draws = torch.empty(8, channels, 64, 64, device=CUDA), torch.empty(8, 7, device=CUDA)
    views = pretrain.augment(x, draws, args)
    a, b = views.contiguous(memory_format=torch.channels_last).chunk(2)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    assert scaler.is_enabled() == (dtype == torch.float16)
    watch = pretrain.train_step(byol, optimizer, scaler, a, b, 0.1, 0.9, nullcontext)
    assert watch.shape == (3,) and watch.device == CUDA and watch.dtype == torch.float32
    assert byol.student(a).dtype == dtype


# probe.py ----------------------------------------------------------------------------------------
@pytest.fixture
def heads() -> list[nn.Module]:
    return [probe.build_head(512, 3) for _ in probe.CHOICES["mlp"]]


def test_heads_train_on_the_gpu_and_never_wait(heads, fake_cuda, monkeypatch):
    made = map(to_fake_cuda, heads)
    monkeypatch.setattr(probe, "build_head", lambda *_: next(made))
    monkeypatch.setattr(nn.Module, "to", lambda head, device: head)  # they are there already
    monkeypatch.setattr(probe, "LEAST_STEPS", 4)
    x = torch.empty(300, 512, device=CUDA)
    y = torch.empty(300, dtype=torch.int64, device=CUDA)
    found = probe.fit_mlps(x, y, 3, probe.CHOICES["mlp"], 2)
    assert found == heads and found[0](x).device == CUDA


@pytest.fixture
def encoder_and_head() -> nn.Module:
    return nn.Sequential(probe.build_encoder("resnet18", 1), probe.build_head(512, 3)).eval()


def test_fullgrad_and_the_floor_stay_on_the_gpu(encoder_and_head, fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda _, xs: [torch.empty_like(x) for x in xs])
    x = torch.empty(4, 1, 64, 64, device=CUDA)
    classes = torch.zeros(4, dtype=torch.int64, device=CUDA)
    maps = probe.fullgrad(to_fake_cuda(encoder_and_head), x, classes)
    assert maps.shape == (4, 64, 64) and maps.device == CUDA
    assert probe.BandStatistics()(x).shape == (4, 12)


# segment.py --------------------------------------------------------------------------------------
@pytest.fixture(params=[False, True], ids=["frozen", "scratch"])
def segmenter(request) -> nn.ModuleDict:
    encoder = segment.dilate(segment.build_encoder("resnet18", 1)).requires_grad_(request.param)
    decoder = torchvision.models.segmentation.deeplabv3.DeepLabHead(encoder.width, 8)
    return nn.ModuleDict({"encoder": encoder.train(request.param), "decoder": decoder})


def test_an_epoch_of_a_decoder_stays_on_the_gpu_and_never_waits(segmenter, fake_cuda, monkeypatch):
    monkeypatch.setattr(segment, "native_bf16", lambda device: False)  # asks the GPU
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**40)  # torch's, and free
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    encoder = to_fake_cuda(segmenter)["encoder"]
    images = torch.empty(7, 1, 64, 64, device=CUDA)
    masks = torch.empty(7, 64, 64, dtype=torch.uint8, device=CUDA)
    x = images if encoder.conv1.weight.requires_grad else segment.encode(encoder, images)
    assert (x is images) == encoder.training
    losses = segment.train(segmenter, x, masks, Namespace(epochs=2, batch_size=3), 0)
    assert losses.device == CUDA and losses.shape == (2,) and losses.dtype == torch.float32


# The stand-in ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + torch.ones(3),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
    ],
    ids=["mixed devices", "item", "tolist", "cpu", "mask", "bool"],
)
def test_a_mixed_device_and_a_hidden_wait_fail_here(fault, fake_cuda):
    with pytest.raises(Exception, match="device|host|data|dynamic|_local_scalar_dense|nonzero"):
        fault(torch.empty(3, device=CUDA))
