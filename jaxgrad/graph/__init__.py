"""Reading a function: its dataflow, its layers, its sites. The only room that opens jaxprs."""
