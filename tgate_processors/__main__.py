import sys

from tgate_processors.cli import main


sys.exit(main())
