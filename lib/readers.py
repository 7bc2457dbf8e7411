"""Processes that read training data ahead of the loop, and how they end."""
import multiprocessing
import os
import signal
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection

from torch.utils.data import DataLoader

from lib.console import UserError

GRACE = 3                                       # seconds that a reader has to finish its batch when a run ends


@contextmanager
def read_batches(data, order, workers, pin_memory=False):
    """An iterator over data.__getitems__(items) for the lists of items in `order`, for as long as a `with` lasts.

    `workers` processes read ahead; 0: this process reads. They end with the `with`, however it ends. Raises UserError
    if one of them has died, and the UserError that one of them raised.
    """
    lifeline = multiprocessing.Pipe(duplex=False)
    start = partial(start_reader, lifeline=lifeline)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")    # more workers than cores: the user's choice
        loader = DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=tuple, worker_init_fn=start,
                            pin_memory=pin_memory)
        batches = one_by_one(iter(loader), workers)
    try:
        yield batches
    except RuntimeError as e:                                               # DataLoader may raise it at any line
        if not str(e).startswith("DataLoader worker"):
            raise
        raise dead_reader(e) from None
    finally:
        lifeline[1].close()
        batches.close()


def one_by_one(iterator, workers):
    """Yield the batches of a DataLoader's iterator. Closing this generator ends the DataLoader's processes.

    A DataLoader ends them when nobody holds its iterator any more. If it were a variable of the training loop, the
    traceback of an error would hold it until the interpreter exits, which then waits for the processes for ever.
    """
    try:
        yield from iterator
    except UserError as e:
        told = str(e).strip().splitlines()[-1]                              # "lib.console.UserError: message"
        raise UserError(told.rpartition("UserError: ")[2]) from None
    except (OSError, EOFError) as e:
        if not workers or "in DataLoader worker process" in str(e):         # an error of reading
            raise
        raise dead_reader(e) from None                                      # it died while it handed a batch over


def dead_reader(error):
    """The UserError for a reader that has died, or cannot hand its batches over."""
    return UserError(f"a process that reads --data has died ({str(error).splitlines()[0]}); if memory was short, try "
                     "fewer --workers; go on with --resume auto")


def start_reader(_, lifeline):
    """Initialise a process that reads: it ends with the `with` of read_batches, or when the training process dies.

    lifeline: both ends of a pipe. Nothing is ever written to it. The reading end becomes ready when all copies of the
    other end are closed. A DataLoader ends its processes between two batches, which may take minutes for videos; so
    after a few seconds the process ends itself.
    """
    ignore_signals()
    reading_end, writing_end = lifeline
    writing_end.close()

    def exit_at_the_end():
        connection.wait([reading_end])
        time.sleep(GRACE)
        os._exit(0)                                                         # 0, or DataLoader takes it for a crash
    threading.Thread(target=exit_at_the_end, daemon=True).start()


def ignore_signals():
    """Ctrl-C and SIGTERM, which a shell or a scheduler sends to all processes, are for the process that started this
    one. That process finishes its step first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
