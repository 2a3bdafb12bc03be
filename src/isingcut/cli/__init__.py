"""The command line.

`main`: the program; `verb`: shared parts of the verbs; `verbs`: the verbs; `show`: their output.
"""
