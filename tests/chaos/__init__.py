"""A campaign of faults against real processes, and the three ledgers that must agree at its end."""
