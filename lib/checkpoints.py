"""Checkpoints of a run: written while training goes on, and read by any number of processes."""
import enum
import json
import os
import pickle
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.tensor import DTensor

from lib.console import UserError, rank_and_world, say
from lib.parallel import TIMEOUT, all_gather_objects

NOT_WRITTEN = (OSError, RuntimeError, ValueError, SafetensorError, dcp.api.CheckpointException)     # a full disk
NOT_READABLE = (OSError, RuntimeError, LookupError, EOFError, ValueError, AttributeError, TypeError, MemoryError,
                pickle.UnpicklingError, dcp.api.CheckpointException)        # what damaged files may lead to


class Checkpoints:
    """The state of a run in FOLDER/STEP/: tensors and notes.json.

    torch.distributed.checkpoint writes the tensors while training goes on. Every process writes its share, and any
    number of processes can read them. A folder gets its name when it is complete. The `keep` newest stay. A full disk
    does not end the run: `failed` says what was not written, and the next save tries again. A damaged checkpoint is set
    aside, and the one before it is used.
    """

    def __init__(self, folder, keep):
        self.folder = folder
        self.keep = keep
        self.rank = rank_and_world()[0]
        self.pending = None                                                 # (temporary folder, future) being written
        self.failed = {}                                                    # {file: why it could not be written}
        self.group = None
        if dist.is_initialized():                                           # a group of its own: training never waits
            self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def complete(self):
        """All complete folders, the newest last."""
        folders = [path for path in self.folder.glob("[0-9]*") if path.name.isdecimal()]
        folders = [path for path in folders if (path / "notes.json").exists()]
        return sorted(folders, key=lambda path: int(path.name))             # names have 7 digits, or more from 10^7 on

    # writing

    def save(self, step, tensors, notes):
        """Start to write a checkpoint. Collective."""
        self.finish()
        self.attempt("state", lambda: self.begin(step, tensors, notes), f"step {step}")

    def begin(self, step, tensors, notes):
        """Copy the tensors and start to write them. Raises OSError if there is no room for the first file."""
        temporary = self.folder / f".{step:07d}"
        written = (self.folder / f"{step:07d}").exists()                    # no step was taken since
        error = None
        if self.rank == 0 and not written:
            try:
                for leftover in self.folder.glob(".[0-9]*"):                # left by a run that was killed
                    shutil.rmtree(leftover)
                temporary.mkdir(parents=True)
                (temporary / "notes.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
            except OSError as e:
                error = e.strerror or str(e)
                shutil.rmtree(temporary, ignore_errors=True)
        error, written = all_gather_objects((error, written))[0]            # all processes do what rank 0 decides
        if error:
            raise OSError(error)
        if written:
            return
        world = rank_and_world()[1]
        share = {}                                                          # what this process writes
        count = 0                                                           # of tensors that every process has whole
        for name, x in tensors.items():
            if not isinstance(x, DTensor):
                count += 1
                if count % world != self.rank:                              # each process writes every world-th of them
                    continue
            share[name] = x.detach()
            if x.device.type == "cpu":                                      # async_save copies only tensors of a GPU
                share[name] = share[name].clone()
        future = dcp.async_save(share, storage_writer=dcp.FileSystemWriter(temporary), process_group=self.group)
        self.pending = (temporary, future)

    def poll(self):
        """Finish the checkpoint that is being written if that takes no waiting."""
        if self.pending and self.pending[1].done():
            self.finish()

    def finish(self):
        """Wait until the checkpoint that is being written is complete."""
        if self.pending:
            self.attempt("state", self.rename, f"step {int(self.pending[0].name[1:])}")

    def rename(self):
        """Give the written folder its name, and delete old ones."""
        temporary, future = self.pending
        self.pending = None
        try:
            future.result()
        except NOT_WRITTEN:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if self.rank == 0:
            os.replace(temporary, temporary.with_name(temporary.name[1:]))
            for old in self.complete()[:-self.keep]:
                shutil.rmtree(old)

    def attempt(self, file, write, name=None):
        """Call write(), print what went wrong, and remember it in `failed` -> whether it worked."""
        self.failed.pop(file, None)
        try:
            write()
            return True
        except NOT_WRITTEN as e:
            reason = last_line(e)
            if isinstance(e, OSError) and e.errno:
                reason = os.strerror(e.errno)
            if "enforce fail" in reason:                                    # what torch says of a failed write
                reason = "no space left"
            steps = [int(path.name) for path in self.complete()]
            intact = f"step {steps[-1]} is intact" if steps else "nothing is saved yet"
            self.failed[file] = f"could not save {name or file} ({reason})"
            say(f"{self.failed[file]}; {intact}")
            return False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Finish pending writes after an error, but not after a second Ctrl-C. At the end of a run train() finishes."""
        if kind is not None and kind is not KeyboardInterrupt:
            self.finish()

    # reading

    def newest(self):
        """(folder, its notes) of the newest checkpoint that is whole, or (None, {}) if there is none. Collective.

        Rank 0 looks, and renames those that are damaged. Raises UserError if all are.
        """
        found = None
        damaged = []
        folders = self.complete() if self.rank == 0 else []
        for path in reversed(folders):
            try:
                found = (path, self.read_notes(path))
                break
            except NOT_READABLE as e:
                aside = path.with_name(f"{path.name}.damaged-{os.urandom(3).hex()}")
                os.replace(path, aside)
                damaged.append(aside)
                say(f"{path}: is damaged ({last_line(e)}) and was renamed to {aside.name}")
        found, damaged = all_gather_objects((found, damaged))[0]
        if damaged and not found:
            raise UserError(f"{self.folder}: no checkpoint in it is whole; start a new run in another --out")
        return found or (None, {})

    @staticmethod
    def read_notes(path):
        """notes.json of a checkpoint. Raises one of NOT_READABLE if it is damaged, or if files are cut or missing."""
        notes = json.loads((path / "notes.json").read_text(encoding="utf-8"))
        lowest = {"step": int(path.name), "micro_batches": 1, "skipped": 0}
        for name, low in lowest.items():
            if type(notes[name]) is not int or notes[name] < low:
                raise ValueError(f"notes.json: {name} is {notes[name]!r}")
        if notes["step"] != int(path.name):
            raise ValueError(f"notes.json: step is {notes['step']}")
        for name in ("settings", "scaler"):
            if not isinstance(notes[name], dict):
                raise ValueError(f"notes.json: {name} is {notes[name]!r}")
        for part in Reader(path).read_metadata().storage_data.values():
            if part.offset + part.length > (path / part.relative_path).stat().st_size:
                raise ValueError(f"{part.relative_path} is cut")
        return notes

    def load(self, path, tensors_for):
        """Fill the tensors that tensors_for(names of saved tensors) returns, {name: tensor}. Collective."""
        try:
            reader = Reader(path)
            tensors = tensors_for(reader.read_metadata().state_dict_metadata)
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        except NOT_READABLE as e:
            way_out = "or choose another --out"
            others = [p for p in self.complete() if p != path]
            if others:
                way_out = f"to go on from step {int(others[-1].name)}"
            raise UserError(f"{path}: cannot continue from it ({last_line(e)}); delete it {way_out}") from None


def last_line(error):
    """The last line of an error's message; torch puts the cause there."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


class Reader(dcp.FileSystemReader):
    """Reads checkpoints that somebody else may have written.

    torch.distributed.checkpoint would unpickle whatever the file .metadata holds, which can run code. Here it may hold
    the classes that describe tensors and nothing else.
    """

    def read_metadata(self, *args, **kwargs):
        with open(os.path.join(self.path, ".metadata"), "rb") as f:
            found = MetadataUnpickler(f).load()
        if not all(isinstance(entry, metadata.TensorStorageMetadata) for entry in found.state_dict_metadata.values()):
            raise pickle.UnpicklingError("refused: it holds other things than tensors")     # these would be unpickled
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles what torch.distributed.checkpoint writes about tensors. Raises UnpicklingError for other classes."""

    def find_class(self, module, name):
        if module == metadata.__name__:
            found = vars(metadata).get(name)
            allowed = isinstance(found, type) and found.__module__ == module
        elif module == "torch":
            found = vars(torch).get(name)
            allowed = found is torch.Size or isinstance(found, torch.dtype)
        elif (module, name) == ("builtins", "getattr"):
            return enum_member
        elif module.split(".")[0] == "pathlib":
            allowed = name in ("PosixPath", "WindowsPath")
        else:
            allowed = (module, name) in ((filesystem.__name__, "_StorageInfo"), ("torch.serialization", "_get_layout"))
        if not allowed:
            raise pickle.UnpicklingError(f"refused: loading it would run code ({module}.{name})")
        return super().find_class(module, name)


def enum_member(cls, name):
    """The member of an enum with this name. Python 3.11.0 to 3.11.3 pickles members as a call of getattr.

    Raises UnpicklingError for anything else that has attributes.
    """
    if not (isinstance(cls, type) and issubclass(cls, enum.Enum)) or name not in cls.__members__:
        raise pickle.UnpicklingError(f"refused: loading it would run code (getattr of {cls})")
    return cls[name]


def named_tensors(learners, ema=None, saved=None, without=()):
    """All tensors of a run by name, to be saved or filled.

    learners: {name: (module, optimizer)}. The optimizer's tensors are named after the weight that they belong to. These
    names are shorter than those of torch.distributed.checkpoint.state_dict, and weights that had no gradient so far
    need none. saved: names in a checkpoint that fills the tensors. A new optimizer has none yet, so that those that the
    checkpoint has are created here. without: names of weights that come from another file.
    """
    tensors = {}
    if ema is not None:
        tensors |= {f"ema.{name}": x for name, x in ema.state_dict().items() if name not in without}
    for what, (model, optimizer) in learners.items():
        tensors |= {f"{what}.{name}": x for name, x in model.state_dict().items() if name not in without}
        for name, p in model.named_parameters():
            if saved is not None and f"{what}.{name}.exp_avg" in saved:
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
            tensors |= {f"{what}.{name}.{key}": x for key, x in optimizer.state.get(p, {}).items()}
    return tensors
