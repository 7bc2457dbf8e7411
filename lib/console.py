"""What a user meets at the command line: errors of one line, the choice of device and precision, the summary line."""
import ctypes
import errno
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import vq
from triton_ops import BackendError, use_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_BYTES = 2**26                              # of a text file that is read as a whole
MOST_SEED = 2**63 - 1                           # a generator takes twice as much, which leaves room for seed + i
INPUTS = ("ckpt", "vae", "t5", "features", "prompts", "image", "mask", "lora")  # flags that name what a command reads
OUTPUTS = ("out", "npz", "save_features", "json", "merge")                  # and what it writes
NOT_PNG = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".mp4", ".npz", ".npy", ".txt", ".json",
           ".safetensors", ".pth", ".pt")       # names that somebody gives who expects another format


class UserError(Exception):
    """A user error, printed as one line: what is wrong, what was expected, how to fix it. The exit code is 2."""


class Interrupted(Exception):
    """A signal arrived in the middle of a validation or of drawing, which is therefore given up."""


class MissingPackage(UserError):
    """An optional package is needed."""


@contextmanager
def understanding(path, expected):
    """Turn whatever goes wrong while a user's file is read and understood into one UserError with its name.

    expected: what the file should have held, such as "one prompt per line".
    """
    try:
        yield
    except vq.CheckpointError:                                              # it says what is wrong, as a UserError does
        raise
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except vq.MISUNDERSTOOD as e:
        raise UserError(f"{path}: expected {expected} ({type(e).__name__}: {str(e)[:200]})") from e


def read_text(path, expected, flag=""):
    """The text of a UTF-8 file, with or without a byte order mark. Raises UserError, which begins with the flag.

    Lines end at \\n or \\r\\n: split("\\n") gives them, where splitlines would also cut at U+2028 and others. Only
    regular files of at most MOST_BYTES are read: a device or a pipe may never end.
    """
    name = f"{flag} {path}".strip()
    with understanding(name, expected):
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{name}: not a file")
        with open(path, "rb") as f:
            content = f.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{name}: has more than {MOST_BYTES >> 20} MB; expected {expected}")
        return content.decode("utf-8-sig").replace("\r\n", "\n")


def run_command(command, args, needs_output=True):
    """Run command(args) and end the process with the right exit code.

    A user error becomes one line and exit code 2, Ctrl-C becomes exit code 130. Anything else is a bug and shows its
    traceback; --traceback shows all of them. needs_output: whether messages that could not be printed are an error.
    """
    keep_freed_memory()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:                   # as it is during the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with guarded_output() as output:
        try:
            command(args)
            output.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except Exception as e:
            message = explain(e)
            if message is None or getattr(args, "traceback", False):
                raise
            exit_with_error(message)
        if needs_output and output.error:
            exit_with_error(f"standard output: {output.error.strerror}")


def explain(error):
    """The line that a user needs for an error that is not a bug; None for a bug."""
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, (UserError, vq.CheckpointError, BackendError)):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return ("out of GPU memory: try a smaller --batch-size (latentsync: --decode, --frames), in training a larger "
                f"--accum, or --dtype bf16 ({reason})")
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory: try a smaller --batch-size, in training a larger --accum or fewer --workers"
    if "WORLD_SIZE" in os.environ and any(words in text for words in ("by peer", "Broken pipe", "NCCL")):
        return f"another process of this run has died; its own message above, or torchrun's below, says why ({reason})"
    if type(error).__name__ == "InductorError":                             # importing the class itself takes seconds
        return ("torch.compile failed; it needs a C++ compiler and room in its cache folder. Leave out --compile "
                f"({reason})")
    if isinstance(error, OSError) and error.errno:                          # a full disk, a missing permission
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def exit_with_error(message):
    """Print a message as one line and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


class GuardedStream:
    """A text stream that drops what it cannot write, because a message must not end a run.

    error: the OSError of the first write that failed, or None. A closed pipe (`| head`) is not counted.
    """

    def __init__(self, stream):
        self.stream = stream
        self.error = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, function, *inputs):
        try:
            function(*inputs)
        except OSError as e:
            if not isinstance(e, BrokenPipeError):
                self.error = self.error or e
            # Whatever is still in the buffer goes nowhere, or the interpreter would complain about it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextmanager
def guarded_output():
    """Guard stdout and stderr for as long as a `with` lasts -> the GuardedStream of stdout.

    Characters that the terminal's encoding lacks are printed as escapes. A stream that the shell has closed (`>&-`) is
    replaced by one that drops everything.
    """
    before = sys.stdout, sys.stderr
    guarded = []
    for stream in before:
        if stream is None:
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        guarded.append(GuardedStream(stream))
    sys.stdout, sys.stderr = guarded
    try:
        yield sys.stdout
    finally:
        sys.stdout, sys.stderr = before


def keep_freed_memory():
    """Tell glibc to keep large freed blocks for the next tensor.

    By default glibc returns them to the system and gets new pages, which the system has to clear. On a CPU that costs
    a run about 4 %. The options are constants of <malloc.h>; without glibc nothing happens.
    """
    set_malloc_options({-4: 0,                                              # M_MMAP_MAX: never use mmap
                        -1: -1,                                             # M_TRIM_THRESHOLD: never shrink the heap
                        -2: 2**26})                                         # M_TOP_PAD: grow it by 64 MB


def return_freed_memory():
    """Tell glibc to give large freed blocks back at once."""
    set_malloc_options({-4: 2**16, -3: 2**17, -1: 2**17, -2: 2**17})        # -3: M_MMAP_THRESHOLD


def set_malloc_options(options):
    """{number of an option: value}, see mallopt."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in options.items():
        mallopt(option, value)


def say(line):
    """Print a line above the progress bar, on rank 0 only."""
    if rank_and_world()[0] == 0:
        tqdm.write(line)
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------------------
# Device, precision, processes


def rank_and_world():
    """(rank of this process, number of processes), as torchrun sets them; (0, 1) without torchrun. Raises UserError."""
    rank = os.environ.get("RANK", "0")
    world = os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UserError(f"RANK={rank} WORLD_SIZE={world}: expected 0 <= RANK < WORLD_SIZE in the environment; torchrun "
                        "sets both, without it unset them")
    return int(rank), int(world)


def choose_device(name):
    """"auto" or the name of a device -> (torch.device, the reason for it).

    Raises UserError if the device does not exist here, and BackendError if OPS_BACKEND cannot run on it.
    """
    why = "as asked"
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
        why = torch.cuda.get_device_name()
    elif name == "auto" and torch.backends.mps.is_available():
        name = "mps"
        why = "Apple GPU"
    elif name == "auto":
        name = "cpu"
        why = "no GPU found"
    device = torch.device(name)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if not available[device.type]():
        raise UserError(f"--device {name}: not on this machine; use --device cpu, or leave it out")
    if device.type == "cuda":                                               # torchrun gives each process its own GPU
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    use_triton(torch.empty(1, device=device))
    return device, why


def choose_dtype(name, device):
    """"auto", "fp32", "bf16" or "fp16" -> (torch.dtype, the reason for it)."""
    if name != "auto":
        return DTYPES[name], "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16, "this GPU computes in it"
    if device.type == "cuda":
        return torch.float16, "this GPU has no bf16"
    why = "half precision is slow on a CPU" if device.type == "cpu" else "safe on mps"
    return torch.float32, why


def synchronize(device):
    """Wait for all work that was given to a GPU. Clocks are read after this."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(run, device):
    """Call run() -> (seconds, its result)."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


class PeakMemory:
    """Peak memory in bytes since this object was made, on calling it.

    On CUDA it is the peak of PyTorch's allocator. On a CPU it is the peak of the process, without the several 100 MB
    that Python and its libraries held before.
    """

    def __init__(self, device):
        self.device = device
        self.before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self.before = self.process_peak()

    @staticmethod
    def process_peak():
        """Peak memory of this process in bytes; 0 on Windows."""
        with suppress(OSError, StopIteration):                              # Linux: ru_maxrss would count the parent
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        try:
            import resource
        except ImportError:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss           # in kilobytes, but on macOS in bytes
        return peak if sys.platform == "darwin" else peak * 1024

    def __call__(self):
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self.process_peak() - self.before


class Machine:
    """Where a command of sample.py runs: device, dtype, the reasons for both, and the peak of its memory."""

    def __init__(self, args):
        self.device, self.device_why = choose_device(args.device)
        self.dtype, self.dtype_why = choose_dtype(args.dtype, self.device)
        self.peak_memory = PeakMemory(self.device)

    def summary(self, models, seconds, where, note="", unit="picture"):
        """The summary line: device, dtype, parameters of the models, seconds per unit, peak memory, output."""
        dtype = next(name for name, value in DTYPES.items() if value == self.dtype)
        parameters = sum(p.numel() for model in models for p in model.parameters())
        parameters += sum(b.numel() for model in models for b in model.buffers() if b.dtype == torch.int8)
        origins = dict.fromkeys(model.origin for model in models if getattr(model, "origin", ""))
        note = "".join(f"weights: {origin}, " for origin in origins) + note
        return (f"{self.device} ({self.device_why}), {dtype} ({self.dtype_why}), {parameters / 1e6:.1f} M parameters, "
                f"{seconds:.2f} s per {unit}, {note}peak memory {self.peak_memory() / 1e9:.2f} GB -> {where}")


# ----------------------------------------------------------------------------------------------------------------------
# Checks of arguments


def check_ranges(*rows):
    """Raise UserError for the first row (flag, value, lowest, highest) whose value is outside, or is not a number.

    A highest of None means a billion, which keeps what is computed from the value in range. A value of None means that
    the flag was not given.
    """
    for flag, value, low, high in rows:
        highest = 10**9 if high is None else high
        if value is None or low <= value <= highest:
            continue
        too_high = high is not None or value > highest
        expected = f"{low} .. {highest}" if too_high else f"at least {low}"
        raise UserError(f"{flag} {value}: expected {expected}")


def check_writable(path, flag="--out", suffix=None):
    """Create the folder of an output and make sure, before any work, that it can be written -> Path.

    With a suffix the path is a file that must end in it, without a suffix it is a folder. A file is tried under its
    temporary name (see vq.atomic), which is longer than its own.
    """
    path = Path(path)
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{flag} {path}: expected a name that ends in {suffix}")
    folder = path.parent if suffix else path
    try:
        if suffix and path.is_dir():
            raise OSError(errno.EISDIR, "it is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe = vq.temporary_name(path if suffix else folder / "probe")     # other machines may probe at the same time
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as e:                                      # ValueError: a null byte
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{flag} {path}: cannot be written ({reason}); choose another place") from None
    return path


def check_out(given, default):
    """--out of a command that makes pictures -> (path, whether it is one .png rather than a folder of them)."""
    path = Path(given or default)
    suffix = path.suffix.lower()
    if suffix in NOT_PNG and not path.is_dir():
        raise UserError(f"--out {path}: expected a name that ends in .png, or a folder")
    single = suffix == ".png"
    return check_writable(path, suffix=".png" if single else None), single


def check_paths(args, out=None):
    """Raise UserError if a path is empty, or if an output would replace something that the command reads.

    out: the output of a command whose --out has a default. Paths are compared with links followed. A folder as output
    must not hold pictures, or lines for GenEval, that are read, because its files get their names by number.
    """
    values = {name: value for name, value in vars(args).items() if name in INPUTS + OUTPUTS}
    for name, value in values.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise UserError(f"--{name.replace('_', '-')} '': is empty; give a path, or leave it out")
    if out is not None:
        values["out"] = out
    inputs = []
    for name in INPUTS:
        value = values.get(name) or []
        inputs += value if isinstance(value, list) else [value]
    outputs = [(f"--{name.replace('_', '-')}", values[name]) for name in OUTPUTS if values.get(name)]
    for flag, output in outputs:
        place = os.path.realpath(output)
        for given in inputs:
            source = os.path.realpath(given)
            inside = os.path.isdir(place) and source.startswith(place + os.sep)
            may_be_numbered = os.path.isdir(given) or source.endswith((".png", ".jsonl"))
            if source == place or (inside and may_be_numbered):
                raise UserError(f"{flag} {output}: would replace {given}, which it is made from; choose another name")


def check_pixels(pixels):
    """Raise UserError for a picture size that vq.schedule does not have; None is allowed."""
    if pixels is not None and pixels not in vq.PIXELS:
        raise UserError(f"--pixels {pixels}: choose one of {', '.join(vq.PIXELS)}")


def check_json(args, bench):
    """Raise UserError if a flag of --bench was given without it, or if --json cannot be written."""
    if args.json and not bench:
        raise UserError("--json goes with --bench")
    if getattr(args, "neighbour", False) and not bench:
        raise UserError("--neighbour goes with --bench")
    if args.json:
        check_writable(args.json, "--json", suffix=".json")


def save_json(path, result):
    """Write a result as JSON; without a path do nothing."""
    if path:
        with vq.atomic(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
