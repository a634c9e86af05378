"""The command line: one file per command. `app` runs them, and `options` makes their options from the configs."""
