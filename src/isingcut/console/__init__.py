"""What is said and shown while something runs.

`printing` lines that are safe and legible anywhere; `rich_console` what tables and bars are printed
on; `progress` a bar with an estimate, or a line now and then.
"""
