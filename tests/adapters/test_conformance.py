"""Every built-in adapter, by the kit that a third party uses."""

import pytest

from kits import KITS

pytestmark = pytest.mark.usefixtures("one_thread")

for cls in KITS.values():
    globals()[cls.__name__] = cls
# The loop's last name would be collected a second time.
del cls
