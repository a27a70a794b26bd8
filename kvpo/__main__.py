from kvpo.cli import main

raise SystemExit(main())
