"""One file per data set layout: which cases there are, and which files make one."""
