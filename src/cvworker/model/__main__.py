from cvworker.model.process import main

main()
