"""What probe.py runs on a GPU, run on FakeTensorMode's cuda tensors: no GPU, nothing is computed.

A tensor left on the CPU fails, and so does what makes the host wait for the GPU. The backward pass
needs a real GPU: in its place every gradient is empty.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import probe

CUDA = torch.device("cuda", 0)
ENCODER, HEAD = probe.build_encoder("resnet18", 1), probe.build_head(512, 3)


class NoCopyToHost(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            cuda = any(isinstance(x, Tensor) and x.is_cuda for x in args)
            assert out.is_cuda or not cuda, "the host waits for a copy"
        return out


def on_cuda(module: nn.Module) -> nn.Module:
    """The module, with fake cuda tensors in place of its own."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, x in own.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device=CUDA)
                    own[name] = nn.Parameter(fake) if name in part._parameters else fake
    return module


@pytest.fixture
def fake_cuda(monkeypatch):
    def empty_gradients(loss: Tensor) -> None:
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                if hasattr(node, "variable"):
                    node.variable.grad = torch.empty_like(node.variable)
                nodes += [parent for parent, _ in node.next_functions]

    monkeypatch.setattr(Tensor, "backward", empty_gradients)
    monkeypatch.setattr(torch.autograd, "grad", lambda _, xs: [torch.empty_like(x) for x in xs])
    with FakeTensorMode(), NoCopyToHost():
        yield


def test_heads_train_on_the_gpu_and_never_wait(fake_cuda, monkeypatch):
    heads = []
    for _ in probe.CHOICES["mlp"]:
        parts = [nn.Linear(512, 128, device=CUDA), nn.BatchNorm1d(128, device=CUDA), nn.ReLU()]
        heads.append(nn.Sequential(*parts, nn.Linear(128, 3, device=CUDA)))
    made = iter(heads)
    monkeypatch.setattr(probe, "build_head", lambda *_: next(made))
    monkeypatch.setattr(nn.Module, "to", lambda head, device: head)  # they are there already
    x = torch.empty(300, 512, device=CUDA)
    y = torch.empty(300, dtype=torch.int64, device=CUDA)
    found = probe.fit_mlps(x, y, 3, probe.CHOICES["mlp"], 2)
    assert found == heads and found[0](x).device == CUDA


def test_fullgrad_and_the_floor_stay_on_the_gpu(fake_cuda):
    x = torch.empty(4, 1, 64, 64, device=CUDA)
    model = nn.Sequential(on_cuda(ENCODER), on_cuda(HEAD)).eval()
    maps = probe.fullgrad(model, x, torch.zeros(4, dtype=torch.int64, device=CUDA))
    assert maps.shape == (4, 64, 64) and maps.device == CUDA
    assert probe.BandStatistics(1)(x).shape == (4, 12)


def test_a_wait_and_a_mixed_device_fail_here(fake_cuda):
    x = torch.empty(3, device=CUDA)
    for fault in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x + torch.ones(3)):
        with pytest.raises(Exception, match="device|host|data|_local_scalar_dense"):
            fault()
