from kvpo.commands.main import program

if __name__ == "__main__":  # a process that `kvpo` starts reads this file under another name
    program()
