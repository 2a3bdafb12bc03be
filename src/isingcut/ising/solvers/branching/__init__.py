"""The exact solver's search: branch and bound over blocks with semidefinite bounds.

`loop` open nodes and threads, `node` what is fixed, `relaxation` `sdp` `dual` lower bounds, `dfs`
`leaves` small subproblems by enumeration, `pool` the best states so far.
"""
