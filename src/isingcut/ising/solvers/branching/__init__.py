"""The exact solver's search: branch and bound over blocks with semidefinite bounds.

`loop` the best states so far, open nodes and threads, `relaxation` `sdp` `dual` lower bounds, `dfs`
small subproblems by enumeration.
"""
