"""The decoder's training step on a pretended GPU: no tensor is left on the CPU, nothing waits."""

import pytest
import torch
import torchvision
from torch._subclasses import FakeTensorMode

import segment


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("scratch", [False, True])
def test_an_epoch_of_training_stays_on_the_gpu_and_never_waits_for_it(monkeypatch, scratch):
    monkeypatch.setattr(segment, "native_bf16", lambda device: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    losses = []

    def backward(loss):  # autograd itself wants a real GPU
        losses.append(loss)
        for p in trained:
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(), torch.device("cuda"):  # a mixed device, .item() or bool() raises
        encoder = segment.dilate(segment.build_encoder("resnet18", 1)).requires_grad_(scratch)
        decoder = torchvision.models.segmentation.deeplabv3.DeepLabHead(encoder.width, 8)
        model = torch.nn.ModuleDict({"encoder": encoder.train(scratch), "decoder": decoder})
        trained = [p for p in model.parameters() if p.requires_grad]
        images, order = torch.zeros(7, 1, 64, 64), torch.arange(7)
        masks = torch.zeros(7, 64, 64, dtype=torch.uint8)
        x = images if scratch else segment.encode(encoder, images)
        optimiser = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / 3)
        batches = order.tensor_split(3)
        mean = segment.train_epoch(model, x, masks, batches, optimiser, schedule)
    assert len(losses) == 3 and all(loss.requires_grad for loss in losses)
    assert mean.device.type == "cuda" and mean.shape == ()
