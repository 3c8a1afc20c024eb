"""What every command shares: flags, help, one-line errors, exit statuses."""

import math
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

from logit_reg.messages import UsageError, notice

FLAGS = flags.FLAGS

# The files that flags name as outputs, by the only suffix each can have, and the folders.
_OUTPUT_FILES = {
    "store_adv_path": ".npy",
    "pred_path": ".npy",
    "zip": ".zip",
    "figure": ".svg",
    "page": ".html",
    "leaderboard": ".html",
}
_OUTPUT_FOLDERS = ("output_dir", "sweep_dir", "demo_dir", "cache_dir", "export")

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130
# "logit-reg-eval" for eval_challenge, and so on.
_ENTRY_POINT = "logit-reg-"
# For the processes that a command starts: what the user typed.
_STARTED_AS = "LOGIT_REG_STARTED_AS"


def run(
    main: Callable[..., None],
    description: str,
    *,
    check_flags: Callable[[], None] = lambda: None,
    takes_arguments: bool = False,
    needs_tensorflow: bool = True,
) -> NoReturn:
    """Parse the flags, call `main` and exit: 0, 2 for usage or input errors, 1 for failures.

    Set LOGIT_REG_TRACEBACK=1 to see the traceback of an error.

    Args:
        main: the command.
        description: what `--help` says above the flags.
        check_flags: called before TensorFlow starts; raises for flags that do not go together.
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
    os.environ.setdefault(_STARTED_AS, _started_as())
    try:
        check_values()
        check_flags()
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
        if isinstance(error, UsageError):
            message = _with_advice(message, error.advice)
        _fail(message, USAGE_ERROR if isinstance(error, ValueError) else FAILURE)
    except Exception as error:
        # Of a machine that is too small, mostly; TensorFlow's errors are none of Python's kinds.
        tensorflow = sys.modules.get("tensorflow")
        is_theirs = tensorflow is not None and isinstance(error, tensorflow.errors.OpError)
        if not is_theirs or os.environ.get("LOGIT_REG_TRACEBACK"):
            raise
        _fail(f"TensorFlow: {' '.join(str(error).split())[:400]}", FAILURE)
    sys.exit(0)


def check_values() -> None:
    """Refuse values that no flag of any command can have, and outputs that cannot be written.

    Raises:
        UsageError: for a number that is not finite, a text that is empty, or the name of an
            output of another kind than the flag writes.
    """
    for name in FLAGS:
        flag = FLAGS[name]
        if not flag.present:
            continue
        if isinstance(flag.value, float) and not math.isfinite(flag.value):
            raise UsageError(f"--{name}={flag.value}: expected a finite number.")
        if flag.value in ("", [], [""]) and flag.default != flag.value:
            raise UsageError(f"--{name} is empty: give it a value, or leave it out.")
        value = str(flag.value)
        if name in _OUTPUT_FILES:
            _check_output_file(name, Path(value), _OUTPUT_FILES[name])
        elif name in _OUTPUT_FOLDERS:
            check_output_folder(name, value, Path(value).expanduser())


def _check_output_file(name: str, path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise UsageError(f"--{name}={path}: expected the name of a {suffix} file.")
    if path.is_dir():
        raise UsageError(f"--{name}={path}: there is a folder of that name; choose another.")
    check_output_folder(name, str(path), path.parent)


def check_output_folder(name: str, value: str, folder: Path) -> None:
    """Check that a folder is there or can be made.

    Args:
        name: of the flag.
        value: of the flag, which names the folder or a file in it.
        folder: to be written to.

    Raises:
        UsageError: if a file is in the way.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"--{name}={value}: {there} is a file, not a folder; choose another.")


def apply_config(values: Mapping[str, object]) -> None:
    """Set flags from a config file, except those given on the command line.

    Args:
        values: by flag name; names without a flag in this command are left out.
    """
    for name, value in values.items():
        if name not in FLAGS or FLAGS[name].present:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                FLAGS[name].parser.parse(str(value))
            except ValueError as error:
                raise UsageError(f"config: {name}: {error}.") from error
        FLAGS[name].value = value


def print_next(command: str, flags: Mapping[str, object]) -> None:
    """Print the command that comes next, ready to paste, started as this one was.

    Args:
        command: name of its script, such as "eval_challenge".
        flags: values by name; lists are joined by commas.
    """
    words = [*_start_of(command), *(_flag_word(*pair) for pair in flags.items())]
    print(f"next: {shlex.join(words)}", flush=True)


def _started_as() -> str:
    """The program that was started, or "-m PACKAGE"."""
    program, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    is_program = Path(program).suffix == ".py" or Path(program).name.startswith(_ENTRY_POINT)
    if is_program and not (spec is not None and spec.name.rpartition(".")[0]):
        return program
    return f"-m {__name__.rpartition('.')[0]}"


def _start_of(command: str) -> list[str]:
    program = os.environ.get(_STARTED_AS) or _started_as()
    if program.startswith("-m "):
        return ["python", "-m", f"{program.removeprefix('-m ')}.{command}"]
    if Path(program).name.startswith(_ENTRY_POINT):
        # As it was typed: with its folder only where that is needed.
        name = f"{_ENTRY_POINT}{command.partition('_')[0]}"
        is_on_path = shutil.which(Path(program).name) == str(Path(program).absolute())
        return [name if is_on_path else str(Path(program).with_name(name))]
    return ["python", str(Path(program).with_name(f"{command}.py"))]


def _flag_word(name, value):
    return f"--{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """One line for what concerns the user; a library's own deprecations do not."""
    if not issubclass(category, DeprecationWarning | FutureWarning):
        notice(f"warning: {message}")


def _with_advice(message: str, advice: Mapping[str, str]) -> str:
    """What came and was expected, and what to do with those flags that this command has."""
    found = [said for name, said in advice.items() if name in FLAGS]
    return f"{message.removesuffix('.')}; {' or '.join(found)}." if found else message


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
