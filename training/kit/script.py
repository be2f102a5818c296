"""How a script is run: settings in, an exit code out, and one line for whoever made a mistake."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from hubgen.errors import is_expected, one_line
from hubgen.training.kit.finite import NonFiniteError
from hubgen.training.kit.parse import parse_settings
from hubgen.training.kit.signals import Interrupted

USAGE_ERROR = 2
"""Exit code of a run that was refused because of what it was given."""

NON_FINITE_ERROR = 3
"""Exit code of a run that stopped at a loss or gradient that is not finite."""

UNFINISHED_ERROR = 4
"""Exit code of a run that has trained and saved, but could not validate or publish."""


class UnfinishedError(RuntimeError):
    """The weights are trained and saved; something beside them failed."""


def run_script(main: Callable[[Any], None], cls: type, *, description: str = "") -> NoReturn:
    """Parse the settings, run `main(settings)` and exit; an expected error becomes one line on stderr and no traceback.

    Exit codes: 0 done; 2 for what the user gave (settings, data, paths, a full disk); 3 for a loss that is not finite;
    4 for a run that is trained and saved, but failed to validate or publish; 128 + signal for a run that saved and
    stopped on a signal. `HUBGEN_TRACEBACK=1` prints the traceback as well.
    """
    try:
        main(parse_settings(cls, description=description))
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        codes = {NonFiniteError: NON_FINITE_ERROR, UnfinishedError: UNFINISHED_ERROR}
        if type(error) not in codes and not is_expected(error):
            raise
        if os.environ.get("HUBGEN_TRACEBACK"):
            traceback.print_exc()
        print(f"error: {one_line(error, 'try a smaller run.batch_size or data.size')}", file=sys.stderr)
        sys.exit(codes.get(type(error), USAGE_ERROR))
    sys.exit(0)
