"""Run by test_session.py, without a launcher, as each of three ranks that watch each other: one kills itself."""

import os
import signal
import sys
import time

from ttr_gpu.distributed import watch as module
from ttr_gpu.distributed.watch import accept, connect, listen

rank, who, port = (int(argument) for argument in sys.argv[1:])
module.LAST_SECONDS = 0.1
if rank == 0:
    server = listen("127.0.0.1")
    print(server.getsockname()[1], flush=True)
    watch = accept(server, 3, "t")
else:
    watch, _ = connect("127.0.0.1", port, rank, 3, "t")
watch.start()
if rank == who:
    os.kill(os.getpid(), signal.SIGKILL)
# As in a collective that can never end.
time.sleep(600)
