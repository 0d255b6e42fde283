import signal
import sys

if "--supervised" in sys.argv:  # Ctrl-C reaches the whole group; `receiver serve` ends a worker that still imports
    signal.signal(signal.SIGINT, signal.SIG_IGN)

from receiver.cli.main import main  # takes seconds on a busy host

main()
