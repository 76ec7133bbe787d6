"""The faults a user can cause, and the exit code each one ends with.

Every message says where, what came, what is allowed and what to do. `cli.py` prints it alone, without a traceback.
Our own bugs are `assert`s and stay tracebacks.
"""

STOPPED = 75
"""Exit code of a run that a signal told to stop and that saved (sysexits' EX_TEMPFAIL)."""

EXIT_CODES = {
    0: "Done.",
    1: "Anything else: the run could not go on, or a fault of ours.",
    2: "Your input is wrong. It is said before a rank starts wherever it can be known.",
    3: "A verification found a difference.",
    STOPPED: "A signal told training to stop. It has saved, and the same command goes on.",
    130: "Ctrl-C.",
}


class UserError(Exception):
    """The user's input is wrong. Raised before ranks start wherever it can be known."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe or an override that cannot be used; lists every fault at once."""


class CheckpointError(UserError):
    """A checkpoint directory that is missing, damaged, or of another model."""


class DataError(UserError):
    """Training data that cannot be used; the message names file and line.

    `field`: which field of the row is at fault, if one is. `place`: file and line of what no row
    can be made of.
    """

    def __init__(self, message: str, field: str | None = None, place: tuple[str, int] | None = None):
        super().__init__(f"{field} {message}" if field else message)
        self.field, self.place = field, place


class LayoutError(UserError):
    """A parallel layout that does not fit the model or the number of ranks."""


class StoppedError(Exception):
    """A run that cannot go on through no fault of the input, and no bug: said in a sentence."""

    exit_code = 1


class SaveError(StoppedError):
    """A checkpoint could not be written; says why."""


class ToldToStop(Exception):
    """A signal came while a step waited for a reward, a tool or a server: the step is given up, and nothing of it is trained."""


class VerificationError(Exception):
    """Two things that must be equal are not. Says how many differ and names the first."""

    exit_code = 3
