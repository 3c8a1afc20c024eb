"""Attack the released networks, then train and attack the paper's defences on 5,000 real digits.

The first table is there in about two minutes, the second one in ten. Needs nothing but a clone and
the installation: networks and digits are in them. Interrupted, it goes on where it was.
"""

from pathlib import Path

from absl import flags

from logit_reg.commands import command_line
from logit_reg.commands.command_line import FLAGS

flags.DEFINE_string("demo_dir", "demo", "folder of the runs and the page")
flags.DEFINE_bool("progress", True, "draw progress bars")


def main() -> None:
    """Show the demo as the flags say."""
    from logit_reg.experiments.demo import run_demo

    run_demo(Path(FLAGS.demo_dir), show_progress=FLAGS.progress)


def run() -> None:
    """Entry point."""
    command_line.run(main, __doc__)


if __name__ == "__main__":
    run()
