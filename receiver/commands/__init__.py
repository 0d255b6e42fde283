"""The verbs of the command line, by what they are for. Importing these modules imports typer alone."""
