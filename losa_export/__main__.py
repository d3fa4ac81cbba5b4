"""`python -m losa_export` is `losa`."""

from losa_export.cli import main

raise SystemExit(main())
