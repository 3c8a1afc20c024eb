"""How far a long computation is: a bar on terminals, a line every half a minute elsewhere."""

import sys
import time

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress(tqdm):
    """`tqdm.tqdm` that does not fill files and pipes with thousands of bars."""

    def __init__(self, *arguments, **options):
        """Take what `tqdm.tqdm` takes."""
        self._is_terminal = sys.stderr.isatty()
        self._last_line = time.monotonic()
        super().__init__(*arguments, **options)

    def display(self, msg=None, pos=None) -> None:
        """Draw the bar or, where nobody watches one, write a line if it is time for it."""
        if self._is_terminal:
            super().display(msg, pos)
        elif (now := time.monotonic()) - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is; there is nothing to leave where none was drawn."""
        if not self._is_terminal:
            self.disable = True
        super().close()

    def _line(self) -> str:
        done = self.format_dict
        total, elapsed = done["total"], done["elapsed"]
        words = [f"{done['n']:,} of {total:,}" if total else f"{done['n']:,} so far"]
        steps = done["n"] - done["initial"]
        if total and steps:
            words.insert(0, f"{100 * done['n'] / total:.0f} %")
            left = elapsed / steps * (total - done["n"])
            words.append(f"{self.format_interval(left)} left")
        if done["postfix"]:
            words.append(done["postfix"])
        return f"{done['prefix'] or 'progress'}: {', '.join(words)}"
