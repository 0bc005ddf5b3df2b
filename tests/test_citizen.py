"""The layer inside the training loops of others: precision, checkpoints, many processes, copies, export; on a CPU."""

import copy
import os
import pickle
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from calls import seeded
from image_local_attention import LocalAttention


def model() -> nn.Sequential:
    """Always the same numbers, the position bias included."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        LocalAttention(3, 8, 3, 3, heads=4, kv_heads=2, border="mask", position_bias=True),
        nn.GELU(),
        LocalAttention(8, 3, 3, 5, scale=None, border=("reflect", "circular"), dilation=(2, 1)),
    )
    nn.init.normal_(layers[0].position_bias, generator=seeded(1))
    return layers


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 6, 7, generator=seeded(2))


def loss_of(layers: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layers(x).square().mean()


def gradients(layers: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in layers.named_parameters()}


@pytest.fixture
def wanted():
    """Gradients of the plain model."""
    layers = model()
    loss_of(layers, images()).backward()
    return gradients(layers)


def test_mixed_precision_with_a_gradient_scaler(wanted):
    layers = model()
    before = copy.deepcopy(layers.state_dict())
    optimizer, scaler = torch.optim.SGD(layers.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layers(images())
    assert out.dtype == torch.bfloat16
    scaler.scale(out.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    for name, grad in gradients(layers).items():
        assert grad.dtype == torch.float32
        assert (grad - wanted[name]).norm() < 0.05 * wanted[name].norm(), name
    scaler.step(optimizer)
    scaler.update()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in layers.named_parameters())
    assert scaler.get_scale() == 2.0**10


def test_activation_checkpoints_change_no_gradient(wanted):
    layers, x = model(), images()
    checkpoint(lambda y: loss_of(layers, y), x, use_reentrant=False).backward()
    for name, grad in gradients(layers).items():
        assert torch.equal(grad, wanted[name]), name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_train_alike(wanted, duplicate):
    layers = model()
    loss_of(layers, images()).backward()
    other = duplicate(layers)
    other.zero_grad()
    loss_of(other, images()).backward()
    for name, grad in gradients(other).items():
        assert torch.equal(grad, wanted[name]), name


def test_export_runs_for_every_batch_and_size():
    layers = model().eval()
    batch, height, width = (torch.export.Dim(name, min=5, max=64) for name in ("batch", "height", "width"))
    program = torch.export.export(layers, (images(5),), dynamic_shapes=({0: batch, 2: height, 3: width},))
    for x in (images(5), torch.randn(7, 3, 9, 5, generator=seeded(3))):
        torch.testing.assert_close(program.module()(x), layers(x))


def test_a_vector_of_parameters_is_a_functional_model(wanted):
    layers = model()

    def loss(parameters):
        return torch.func.functional_call(layers, parameters, images()).square().mean()

    for name, grad in torch.func.grad(loss)(dict(layers.named_parameters())).items():
        torch.testing.assert_close(grad, wanted[name])


def alone(work, rank: int, folder: str) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        torch.save(work(rank), os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def two_processes(work) -> list[dict[str, torch.Tensor]]:
    """What each of them returns."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        processes = [context.Process(target=alone, args=(work, rank, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            if process.is_alive():
                process.kill()
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]


def work_of_ddp(rank: int) -> dict[str, torch.Tensor]:
    layers = nn.parallel.DistributedDataParallel(model())
    loss_of(layers, images().chunk(2)[rank]).backward()
    return gradients(layers.module)


def work_of_fsdp(rank: int) -> dict[str, torch.Tensor]:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    layers = model()
    for layer in (layers[0], layers[2], layers):
        fully_shard(layer, mesh=mesh)
    loss_of(layers, images().chunk(2)[rank]).backward()
    return {name: grad.full_tensor() for name, grad in gradients(layers).items()}


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")


@needs_gloo
@pytest.mark.parametrize("work", [work_of_ddp, work_of_fsdp])
def test_two_processes_train_as_one_does_on_both_batches(wanted, work):
    for grads in two_processes(work):
        assert set(grads) == set(wanted)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, wanted[name])
