"""What every command shares: flags, help, one-line errors, exit statuses."""

import os
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from absl import flags

FLAGS = flags.FLAGS

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
# "logit-reg-eval" for eval_challenge, and so on.
_ENTRY_POINT = "logit-reg-"


class UsageError(ValueError):
    """The user's mistake; the message says what came, what was expected and what to do."""


def run(
    main: Callable[..., None],
    description: str,
    *,
    takes_arguments: bool = False,
    needs_tensorflow: bool = True,
) -> NoReturn:
    """Parse the flags, call `main` and exit: 0, 2 for usage or input errors, 1 for failures.

    Set LOGIT_REG_TRACEBACK=1 to see the traceback of an error.

    Args:
        main: the command.
        description: what `--help` says above the flags.
        takes_arguments: call `main` with the list of arguments that are no flags; otherwise they
            are refused.
        needs_tensorflow: import it first, without its chatter.
    """
    own = FLAGS.flags_by_module_dict()
    names = {flag.name for module in own.values() for flag in module}
    arguments = sys.argv[1:]
    if {"-h", "-help", "--help", "--helpfull", "--helpshort"} & set(arguments):
        try:
            _print_help(description, own)
            sys.stdout.flush()
        except BrokenPipeError:
            _stop_printing()
        sys.exit(0)
    try:
        rest = FLAGS(sys.argv)[1:]
        if rest and not takes_arguments:
            raise UsageError(f"unexpected argument {rest[0]!r}; flags look like --name=value.")
    except (flags.Error, UsageError) as error:
        message = " ".join(str(error).split())
        _fail(f"{message} (--help lists the {len(names)} flags)", USAGE_ERROR)
    warnings.showwarning = _show_warning
    try:
        if needs_tensorflow:
            _import_tensorflow_quietly()
        main(*([rest] if takes_arguments else []))
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on where it stopped.", INTERRUPTED)
    except BrokenPipeError:
        _stop_printing()
        sys.exit(FAILURE)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("LOGIT_REG_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        _fail(message, USAGE_ERROR if isinstance(error, ValueError) else FAILURE)
    sys.exit(0)


def apply_config(values: Mapping[str, object]) -> None:
    """Set flags from a config file, except those given on the command line.

    Args:
        values: by flag name; names without a flag in this command are left out.
    """
    for name, value in values.items():
        if name in FLAGS and not FLAGS[name].present:
            FLAGS[name].value = value


def notice(message: str) -> None:
    """Tell the user something on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_next(command: str, flags: Mapping[str, object]) -> None:
    """Print the command that comes next, ready to paste, started as this one was.

    Args:
        command: name of its script, such as "eval_challenge".
        flags: values by name; lists are joined by commas.
    """
    words = [*_start_of(command), *(_flag_word(*pair) for pair in flags.items())]
    print(f"next: {shlex.join(words)}", flush=True)


def _start_of(command):
    program = sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.rpartition(".")[0]:
        return ["python", "-m", f"{spec.name.rpartition('.')[0]}.{command}"]
    if Path(program).name.startswith(_ENTRY_POINT):
        # As it was typed: with its folder only where that is needed.
        name = f"{_ENTRY_POINT}{command.partition('_')[0]}"
        is_on_path = shutil.which(Path(program).name) == str(Path(program).absolute())
        return [name if is_on_path else str(Path(program).with_name(name))]
    return ["python", str(Path(program).with_name(f"{command}.py"))]


def _flag_word(name, value):
    return f"--{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def existing_path(name: str, value: str) -> Path:
    """A path that a flag names, checked to exist.

    Raises:
        UsageError: if it does not.
    """
    path = Path(value).expanduser()
    if not path.exists():
        raise UsageError(f"--{name}={value}: no such file or folder.")
    return path


def num_examples(wanted: int | None, available: int) -> int:
    """How many of the available images --num_eval_examples asks for.

    Raises:
        UsageError: if it is not positive.
    """
    if wanted is None:
        return available
    if wanted < 1:
        raise UsageError(f"--num_eval_examples must be at least 1; got {wanted}.")
    if wanted > available:
        notice(f"--num_eval_examples={wanted}: there are {available} images, all are taken.")
    return min(wanted, available)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """One line for what concerns the user; a library's own deprecations do not."""
    if not issubclass(category, DeprecationWarning | FutureWarning):
        notice(f"warning: {message}")


def _fail(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _stop_printing() -> None:
    """Nobody reads on, as after `| head`: what Python still holds back goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_help(description: str, own: Mapping[str, list[flags.Flag]]) -> None:
    print(description.strip(), "\n\nFlags:", sep="")
    for module, module_flags in own.items():
        if module.startswith("absl"):
            continue
        for flag in module_flags:
            default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})"
            choices = getattr(flag.parser, "enum_values", None)
            value = f"<{'|'.join(choices)}>" if choices else f"<{flag.flag_type()}>"
            if flag.flag_type().startswith("comma separated"):
                value = "<value,value,...>"
            name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={value}"
            # absl puts the choices before what an enum says.
            said = flag.help.removeprefix(f"{value}: ")
            print(f"  {name}\n      {said}{default}")


def _import_tensorflow_quietly() -> None:
    """Import TensorFlow without its start-up chatter, which no setting silences.

    It is printed from C++ straight to the file descriptor, before logging is set up. If the
    import fails, what was held back is shown.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    # TensorFlow's own choice leaves it off on processors without AVX-512, where it is half as
    # fast again on these networks.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.stderr.flush()
    descriptor = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            import keras
            import tensorflow as tf

            tf.config.list_logical_devices()
        except BaseException:
            held_back.seek(0)
            os.write(descriptor, held_back.read())
            raise
        finally:
            os.dup2(descriptor, 2)
            os.close(descriptor)
    if keras.backend.backend() != "tensorflow":
        raise UsageError(
            f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}: training and attacks are TensorFlow; "
            f"unset it. Saved networks load under any backend."
        )
