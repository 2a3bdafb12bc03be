"""The exact solver's search: branch and bound over blocks with semidefinite bounds.

`search` the loop, `node` what is fixed, `relaxation` `sdp` `dual` lower bounds, `dfs` `leaves`
small subproblems by enumeration, `pool` the best states so far.
"""
