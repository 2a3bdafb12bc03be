"""Output to the terminal.

`printing`: lines that are safe in any terminal and encoding; `rich_console`: the console for tables
and bars; `progress`: progress bars, or lines in a log.
"""
