"""The console's pages: for each, the queries behind it and its actions."""
