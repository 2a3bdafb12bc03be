"""The command line.

`main` the program, `verb` `options` what verbs share, a file for each family of verbs (`runs`
`states` `models` `healing` `share` `look`), `show` `show_scores` what they print.
"""
