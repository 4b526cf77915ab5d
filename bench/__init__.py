"""Measurements. Each script prints what it saw and writes JSON with machine, commit and command."""
