"""What a person did that cannot work, said in words a person can act on."""


class UserError(Exception):
    """A mistake in the input: a flag, a file, a folder, a checkpoint.

    The message says what is wrong, which file or flag, and what to do. It is printed once, by rank
    0, without a traceback, and every process ends with `EXIT_USER_ERROR`.
    """


class OutOfMemory(UserError):
    """The options ask for more memory than there is."""


class Interrupted(Exception):
    """A signal ended the run between two steps; its state was saved and can be resumed."""


class Lost(Exception):
    """Another process of the run is gone without a word, or none of them moves any more."""


EXIT_CRASH = 1  # a defect of the program: the traceback is printed
EXIT_USER_ERROR = 2  # the same code that argparse uses for a wrong flag
EXIT_OUT_OF_MEMORY = 3
EXIT_LOST = 4  # a process of the run was killed, or none moved for --timeout minutes
EXIT_ABORTED = 130  # Ctrl-C outside of training, or twice: nothing was saved
EXIT_INTERRUPTED = 75  # a signal ended the run after its state was saved: `--resume auto` goes on
