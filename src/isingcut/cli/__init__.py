"""The command line.

`main` the program, `verb` what verbs share, `verbs` the verbs, `show` what they print.
"""
