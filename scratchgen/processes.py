"""The processes behind `runtime.Workers`: how one is forked, asked, and ended, and how questions and answers travel."""

import io
import mmap
import os
import pickle
import signal
import traceback
from contextlib import suppress
from multiprocessing import Pipe

KILLED = "a worker process was killed, perhaps for want of memory: try fewer --workers"
MAILBOX_BYTES = 64 << 20  # per direction and helper; only what is ever used takes memory


def stop(helpers):
    """End these processes, whatever they are doing, and empty the list."""
    while helpers:
        helpers.pop().kill()


class Helper:
    """A process forked from this one that answers one question after another until the pipe to it is closed."""

    def __init__(self, known):
        self.questions, self.answers = Post(known), Post(known)
        # Ctrl-C goes to the whole group of processes, and some send SIGTERM to all of it, too. The parent decides what
        # then happens; in the helper both stay blocked.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
        self.owner, self.pid = os.getpid(), os.fork()
        if self.pid == 0:
            try:
                self.serve()
            finally:
                os._exit(0)  # nothing of what the parent had planned for its own end
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.questions.receiver.close()
        self.answers.sender.close()

    def serve(self):
        self.questions.sender.close()
        self.answers.receiver.close()
        try:
            while True:
                f, item = self.questions.receive(copy=False)
                try:
                    answer = f(item), None
                except BaseException as error:
                    answer = portable(error), traceback.format_exc()
                try:
                    self.answers.send(answer)
                except (pickle.PicklingError, TypeError, AttributeError) as error:  # what f returned cannot travel
                    self.answers.send((portable(error), traceback.format_exc()))
        except (EOFError, BrokenPipeError):  # the parent has ended, in whatever way
            return

    def ask(self, f, item):
        try:
            self.questions.send((f, item))
        except OSError:
            raise ChildProcessError(KILLED) from None

    def answer(self, copy):
        try:
            answer, trace = self.answers.receive(copy)
        except (EOFError, OSError):
            raise ChildProcessError(KILLED) from None
        if trace:
            raise answer from RuntimeError(f"in a worker process:\n{trace}")
        return answer

    def kill(self):
        if self.owner == os.getpid():  # and not a copy of this object in another helper
            with suppress(ChildProcessError, ProcessLookupError):  # reaped by somebody else
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def portable(error):
    """The exception itself, if it survives pickling, or else a RuntimeError that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


class Post:
    """One direction between two processes: known objects go as their ids, arrays through shared memory, the rest
    (and arrays for which there is no room) through a pipe."""

    def __init__(self, known):
        self.known = known
        self.memory = mmap.mmap(-1, MAILBOX_BYTES)
        self.receiver, self.sender = Pipe(duplex=False)

    def send(self, message):
        places, end = [], 0

        def put(buffer):  # called by pickle for each array; whether pickle itself should carry it
            nonlocal end
            raw = buffer.raw()
            if end + raw.nbytes > MAILBOX_BYTES:
                return True
            self.memory[end : end + raw.nbytes] = raw
            places.append(slice(end, end + raw.nbytes))
            end += -(-raw.nbytes // 64) * 64  # the next array begins where one may begin in memory
            return False

        text = io.BytesIO()
        pickler = pickle.Pickler(text, protocol=5, buffer_callback=put)
        pickler.persistent_id = lambda thing: id(thing) if id(thing) in self.known else None
        pickler.dump(message)
        self.sender.send((places, text.getvalue()))

    def receive(self, copy):
        """The next message; its arrays lie in the shared memory until the next one comes, or are copies."""
        places, text = self.receiver.recv()
        buffers = [memoryview(self.memory)[place] for place in places]
        unpickler = pickle.Unpickler(io.BytesIO(text), buffers=map(bytearray, buffers) if copy else buffers)
        unpickler.persistent_load = self.known.__getitem__
        return unpickler.load()
