"""Many processes that train one model: torchrun starts them, DDP or FSDP2 exchanges their gradients.

A step's batch is cut into micro-batches. Two processes with --accum 2 share four of them: rank 0 takes 0 and 2, rank 1
takes 1 and 3. Each process runs forward and backward on its own micro-batches with their own random draws. During the
backward pass of its last one the engine averages the gradients of all processes, so all of them clip and apply the
same gradient. With DDP every process holds the whole model and the whole optimizer state. With FSDP every process holds
a shard of both and of the EMA; the weights of a block are gathered when the block runs and freed after it. Rank 0 alone
writes files, draws and prints. Validation is shared. A function that says "collective" must be called by all processes,
or the others wait for ever.
"""
import copy
import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lib.console import UserError, rank_and_world

TIMEOUT = timedelta(hours=1)                    # rank 0 may draw pictures while the others wait
CALLED_DIRECTLY = ("modulation", "condition", "layer")      # methods of blocks that read weights besides forward


def join(device):
    """Connect to the other processes, if there are any: NCCL for tensors on GPUs, gloo for everything else.

    Raises UserError if the environment does not say where they are.
    """
    if rank_and_world()[1] > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} without MASTER_ADDR and MASTER_PORT in the "
                            "environment: start processes with torchrun, or unset WORLD_SIZE and RANK")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)


def all_gather_objects(thing):
    """`thing` of every process, as a list in the order of ranks. Collective."""
    things = [thing] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def all_reduce_max(number):
    """The largest of an int of every process. Collective."""
    number = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


class Objective(torch.nn.Module):
    """A task's loss as the forward pass of a module that holds the model: DDP and FSDP act on calls of a module."""

    def __init__(self, model, loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *inputs):
        return self.loss(*inputs)


def repeated_blocks(model):
    """The modules that a model repeats, such as transformer blocks. They are compiled and sharded one by one."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    blocks = [block for modules in lists for block in modules]
    nested = {id(m) for block in blocks for m in block.modules() if m is not block}
    return [block for block in blocks if id(block) not in nested]


def data_parallel(model, loss, unused_weights=False):
    """An Objective in which DDP averages gradients. unused_weights: some weights get no gradient in some steps."""
    objective = Objective(model, loss)
    if not dist.is_initialized():
        return objective
    return DistributedDataParallel(objective, gradient_as_bucket_view=True, find_unused_parameters=unused_weights)


def shard(model, dtype, loss=None):
    """Shard a model with FSDP2: every process keeps its part of every weight. With a loss, returns an Objective.

    The weights of a block are gathered in `dtype`, the precision of the run. Weights outside of blocks stay float32.
    """
    # deepcopy takes the tensors in this dict as copies that exist already, so the copy needs no memory for weights.
    weightless = {id(p): torch.nn.Parameter(p.to("meta"), requires_grad=False) for p in model.parameters()}
    object.__setattr__(model, "unsharded_copy", copy.deepcopy(model, weightless))               # not as a submodule
    keep = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, **keep)
    for p in model.parameters():
        p.data = p.data.contiguous()                                        # FSDP does not accept channels_last
    mesh = init_device_mesh(next(model.parameters()).device.type, (rank_and_world()[1],))
    for block in repeated_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for method in CALLED_DIRECTLY:
            if hasattr(block, method):
                register_fsdp_forward_method(block, method)
    root = model if loss is None else Objective(model, loss)
    return fully_shard(root, mesh=mesh, mp_policy=MixedPrecisionPolicy(**keep))


@contextmanager
def gradient_sync(engine, last):
    """Exchange gradients in the last backward pass of a step only. Until then every process adds up its own.

    FSDP adds up gradients of whole weights then, which takes the memory of the unsharded model.
    """
    if isinstance(engine, FSDPModule):
        engine.set_requires_gradient_sync(last)
    with engine.no_sync() if isinstance(engine, DistributedDataParallel) and not last else nullcontext():
        yield


def unshard(x):
    """A whole tensor from the shards of all processes; other tensors as they are. Collective."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def full_model(model, write=False):
    """The model with whole weights, on every process, for as long as a `with` lasts. Collective.

    Without FSDP it is the model itself. With write=True changes to it are kept; all processes must make the same ones.
    """
    skeleton = getattr(model, "unsharded_copy", None)
    if skeleton is None:
        yield model
        return
    options = StateDictOptions(full_state_dict=True)
    whole = copy.deepcopy(skeleton)
    whole.load_state_dict(get_model_state_dict(model, options=options), assign=True)
    with torch.no_grad():
        yield whole
    if write:
        set_model_state_dict(model, whole.state_dict(), options=options)
