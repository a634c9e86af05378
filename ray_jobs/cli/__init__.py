"""The command line: one file per command. `app` runs them; `typer_options` generates their options from the configs."""
