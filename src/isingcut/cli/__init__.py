"""The command line.

`main` the program, `verb` what verbs share, `verbs` and `healing` the verbs, `show` `show_scores`
what they print.
"""
