import signal
import sys

if "--supervised" in sys.argv:  # Ctrl-C and a closed terminal reach the whole group; `receiver serve` ends its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

from receiver.cli.main import main  # these imports take seconds on a busy host

main()
