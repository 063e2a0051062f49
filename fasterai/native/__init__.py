"Code in C: how it is compiled and loaded, and what it does to every weight in an event."
