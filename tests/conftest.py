"""One thread a process, for every test however it is started.

Tiny models are slower with two, and processes that each spin on two threads slow each other
tenfold. Set here and not in a command, before torch is imported anywhere, so that subprocesses
have it too.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
