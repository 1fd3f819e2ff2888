"""`python -m vlm_jax` is the `vlm-jax` command."""

from vlm_jax.cli import main

raise SystemExit(main())
