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
    reading_end, writing_end = multiprocessing.Pipe(duplex=False)
    start = partial(start_reader, reading_end=reading_end, writing_end=writing_end)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")    # more workers than cores: the user's choice
        loader = DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=tuple, worker_init_fn=start,
                            pin_memory=pin_memory)
        batches = batches_of(iter(loader), workers)
    try:
        yield batches
    except RuntimeError as e:
        if not str(e).startswith("DataLoader worker"):
            raise
        raise dead_reader(e) from None                                      # a signal handler of PyTorch raised it
    finally:
        writing_end.close()
        batches.close()


def batches_of(iterator, workers):
    """Yield the batches of a DataLoader's iterator. Closing this generator ends the DataLoader's processes.

    A DataLoader ends its processes when its iterator is deleted. Only this generator holds the iterator, and lets go of
    it when it is closed. A variable of the training loop would not let go after an error, because the traceback holds
    it. The interpreter would then wait for the processes for ever when it exits.
    """
    try:
        yield from iterator
    except UserError as e:
        last_line = str(e).strip().splitlines()[-1]                         # "lib.console.UserError: message"
        raise UserError(last_line.rpartition("UserError: ")[2]) from None
    except (OSError, EOFError) as e:
        if not workers or "in DataLoader worker process" in str(e):         # reading the data raised it
            raise
        raise dead_reader(e) from None                                      # the process died as it handed a batch over


def dead_reader(error):
    """The UserError for a reader that has died, or cannot hand its batches over."""
    return UserError(f"a process that reads --data has died ({str(error).splitlines()[0]}); if memory was short, try "
                     "fewer --workers; go on with --resume auto")


def start_reader(_, reading_end, writing_end):
    """Initialise a process that reads: it ends with the `with` of read_batches, or when the training process dies.

    A DataLoader ends its processes between two batches, but a batch of videos may take minutes. So the process also
    ends itself, a few seconds after the end of the `with`. It learns of that through a pipe to which nothing is ever
    written: the reading end becomes ready when all copies of the writing end are closed.
    """
    ignore_signals()
    writing_end.close()                                                     # the copy of this process

    def exit_at_the_end():
        connection.wait([reading_end])
        time.sleep(GRACE)
        os._exit(0)     # it ends all threads, where sys.exit ends this one. DataLoader takes other codes for a crash.
    threading.Thread(target=exit_at_the_end, daemon=True).start()


def ignore_signals():
    """Ignore Ctrl-C and SIGTERM, which a shell or a scheduler sends to all processes of a run.

    The process that started this one reacts to them: it finishes its step first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
