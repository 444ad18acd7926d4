"""The claims that ``difftilt check`` measures, one file per card or part."""
