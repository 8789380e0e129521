"""Launch Fabric on one machine: device, precision and number of processes."""

import os

from torch import nn

try:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
except ModuleNotFoundError:  # the same code, packaged with the rest of Lightning
    from lightning.fabric import Fabric  # type: ignore[no-redef]
    from lightning.fabric.plugins.environments import (  # type: ignore[no-redef]
        LightningEnvironment,
        TorchElasticEnvironment,
    )

from ..utils.device import pick_device
from ..utils.errors import HovitError, one_line
from .precision import CPUAutocast


def check_batch_norm(model: nn.Module, batch_size: int, world: int) -> None:
    """Check that BatchNorm gets more than one image per process.

    Raises:
        HovitError: if the model has BatchNorm and `world` processes get one image each.
    """
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if has_batch_norm and batch_size // world < 2:
        raise HovitError(
            f"a batch of {batch_size} gives each of {world} processes one image, but BatchNorm "
            "needs two; use fewer processes or a larger batch"
        )


def make_fabric(precision: str, accelerator: str = "auto") -> Fabric:
    """Launch Fabric on one machine: one process, or those of torchrun or srun.

    DDP looks for unused parameters, because some models have weights that the forward pass does
    not use (the dead kv weights in the deck).

    Raises:
        HovitError: for an accelerator that this machine does not have, more than one machine, or
            more processes than GPUs.
    """
    accelerator = pick_device(accelerator).type
    processes = _launched_processes()
    cpu_autocast = accelerator == "cpu" and precision == "bf16-mixed"
    for name in [name for name in os.environ if name.startswith("LT_")]:
        del os.environ[name]  # Lightning's own launcher overrides the arguments below
    try:
        # Explicit: in a Slurm allocation without srun, Fabric would assume several processes.
        environment = TorchElasticEnvironment() if processes > 1 else LightningEnvironment()
        fabric = Fabric(
            accelerator=accelerator,
            devices=processes,
            strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
            plugins=[environment, CPUAutocast()] if cpu_autocast else environment,
            precision=None if cpu_autocast else precision,  # type: ignore[arg-type]
        )
        fabric.launch()
    except Exception as error:  # Fabric raises errors of many types
        raise HovitError(
            f"cannot start {processes} process(es) on {accelerator}: {one_line(error)}"
        ) from None
    return fabric


def _launched_processes() -> int:
    """Number of processes that torchrun or srun started; 1 for any other launch.

    Variables of an allocation (SLURM_NTASKS) and stray WORLD_SIZE or LOCAL_RANK are ignored.

    Raises:
        HovitError: if the processes are on more than one machine.
    """
    env = os.environ
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if "TORCHELASTIC_RUN_ID" in env:
        world, local = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    elif tasks > 1 and {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"} <= env.keys():
        world = tasks
        local = tasks if env.get("SLURM_STEP_NUM_NODES", "1") == "1" else 0
        # Tasks of a step find each other as torchrun's processes do.
        env |= {"RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "GROUP_RANK": "0",
                "WORLD_SIZE": str(tasks), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        step = int(env["SLURM_JOB_ID"]) * 101 + int(env.get("SLURM_STEP_ID", 0))
        env["MASTER_PORT"] = str(20_000 + step % 10_000)
    else:
        return 1
    if world != local:
        raise HovitError(f"{world} processes on several machines: training runs on one machine")
    return world
