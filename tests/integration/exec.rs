//! Jobs that run a command, as people who come from torchrun expect it: the environment, one gang that begins anew as a whole, ends of every kind, and that
//! nothing is left of a command that is over.

use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Cluster, Ended, poll, process_of, rank_on, signal, stoke, text};

/// A job's folder: its spec, its scripts, and what its ranks share.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    }

    fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.path(name)).ok()
    }

    /// What appears in a file that ranks write.
    fn wait_for(&self, name: &str) -> String {
        poll(name, || self.read(name).filter(|text| text.ends_with('\n'))).trim().to_owned()
    }

    /// A number in such a file.
    fn pid(&self, name: &str) -> u32 {
        self.wait_for(name).parse().expect("a process id")
    }

    /// A spec with this `[exec]`; `SHARED` tells commands of this folder.
    fn spec(&self, exec: &str, more: &str) -> String {
        let shared = self.0.path().display();
        self.write(
            "job.toml",
            &format!("name = \"exec\"\n[exec]\n{exec}\nenv = {{ SHARED = \"{shared}\" }}\n[resources]\nmemory = \"64MiB\"\n{more}\n"),
        )
    }

    /// Of its jobs' commands.
    fn processes(&self) -> Vec<u32> {
        processes_with(self.0.path().to_str().expect("UTF-8"))
    }

    fn submit(&self, cluster: &Cluster, exec: &str, more: &str) -> String {
        text(&cluster.json(&["submit", &self.spec(exec, more)])["job"])
    }
}

/// `command = [...]` of a line for the shell.
fn shell(line: &str) -> String {
    format!("shell = true\ncommand = '''{line}'''")
}

/// Says that it has started, and with which process id; a second time it is done.
const ONCE_AGAIN: &str = r#"
echo $TORCHELASTIC_RESTART_COUNT/$WORLD_SIZE >> $SHARED/starts-$RANK
if [ -e $SHARED/checkpoint ]; then exit 0; fi
(sleep 1000; true) &
echo $$ > $SHARED/pid-$RANK
wait
"#;

fn is_there(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Processes with this word in their environment.
fn processes_with(word: &str) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: &u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains(word) && is_there(*pid)
    };
    ids.filter(has).collect()
}

fn logs(cluster: &Cluster, job: &str) -> String {
    cluster.run(&["logs", job]).expect(0).stdout
}

const MEET: &str = r#"
import json, os, socket, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    door = socket.create_server(master)
    guests = [door.accept()[0] for _ in range(world - 1)]
    print("met", sorted(guest.recv(9).decode() for guest in guests))
    for guest in guests:
        guest.sendall(b"welcome")
else:
    while True:
        try:
            host = socket.create_connection(master, 5)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    host.sendall(b"rank-%d" % rank)
    print("heard", host.recv(9).decode())
print("to stderr", file=sys.stderr)
with open(f"{os.environ['SHARED']}/environment-{rank}", "w") as file:
    print(json.dumps(dict(os.environ, CWD=os.getcwd(), FILES=os.listdir("."))), file=file)
"#;

#[test]
fn two_ranks_have_the_environment_of_torchrun_and_meet_at_the_master() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let script = folder.write("meet.py", MEET);
    let job = folder.submit(
        cluster,
        &format!("command = [\"python3\", {script:?}]\npass_env = [\"NO_SUCH_THING\"]"),
        "ranks = 2",
    );
    let view = cluster.wait_for_state(&job, "succeeded");
    let exits = view["exec"]["exits"].as_array().expect("exits");
    assert!(exits.len() == 2 && exits.iter().all(|exit| exit["code"] == 0), "{view:#}");
    assert_eq!((&view["exec"]["restarts"], &view["outcome"]), (&0.into(), &Value::Null), "{view:#}");
    let environments: Vec<Value> = (0..2)
        .map(|rank| serde_json::from_str(&folder.wait_for(&format!("environment-{rank}"))).expect("JSON"))
        .collect();
    for (rank, found) in environments.iter().enumerate() {
        let expected = [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", "0".into()),
            ("WORLD_SIZE", "2".into()),
            ("LOCAL_WORLD_SIZE", "1".into()),
            ("GROUP_RANK", rank.to_string()),
            ("TORCHELASTIC_RESTART_COUNT", "0".into()),
            ("TORCHELASTIC_MAX_RESTARTS", "2".into()),
            ("TORCHELASTIC_RUN_ID", job.clone()),
            ("STOKE_JOB", job.clone()),
            ("STOKE_GENERATION", "1".into()),
            ("STOKE_RANK", rank.to_string()),
            ("SHARED", folder.0.path().display().to_string()),
        ];
        for (name, value) in expected {
            assert_eq!(found[name], value, "{name} of {found:#}");
        }
        assert_eq!(found["FILES"], serde_json::json!([]), "{found:#}");
        for name in ["STOKE_LINK_FD", "STOKE_KEEPER", "STOKE_PEER_IP", "XDG_DATA_HOME", "CARGO", "NO_SUCH_THING"] {
            assert_eq!(found[name], Value::Null, "{name} is not for the command: {found:#}");
        }
        // Its rank ends a moment after its job.
        let gone = |name: &str| !Path::new(&text(&found[name])).exists();
        poll("the end of its folders", || (gone("CWD") && gone("TMPDIR")).then_some(()));
    }
    assert_eq!(environments[0]["MASTER_PORT"], environments[1]["MASTER_PORT"]);
    assert_ne!(environments[0]["CWD"], environments[1]["CWD"]);
    let logs = logs(cluster, &job);
    for line in ["met ['rank-1']", "heard welcome", "to stderr"] {
        assert!(logs.contains(line), "{line} is missing:\n{logs}");
    }
}

#[test]
fn a_command_that_is_killed_restarts_the_gang_and_the_job_goes_on_from_its_checkpoint() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let job = folder.submit(cluster, &shell(ONCE_AGAIN), "ranks = 2");
    let (other, killed) = (folder.pid("pid-0"), folder.pid("pid-1"));
    folder.write("checkpoint", "step 7");
    signal(killed, Signal::KILL);
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&view["exec"]["restarts"], &view["recoveries"]), (&1.into(), &1.into()), "{view:#}");
    for rank in 0..2 {
        assert_eq!(folder.read(&format!("starts-{rank}")).as_deref(), Some("0/2\n1/2\n"));
    }
    assert!(!is_there(other), "the other rank's first command is still there");
    let explained = cluster.run(&["explain", &job]).expect(0).stdout;
    assert!(explained.contains("the command was killed by signal 9"), "{explained}");
    assert_eq!(folder.processes(), [0; 0]);
}

#[test]
fn exit_codes_end_a_job_after_its_attempts_or_at_once() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let fails = "echo the disk is on fire >&2; echo $TORCHELASTIC_RESTART_COUNT >> $SHARED/tries-$RANK; exit 3";
    let job = folder.submit(cluster, &shell(fails), "ranks = 1\n[restart]\nattempts = 2");
    let view = cluster.wait_for_state(&job, "failed");
    let reason = text(&view["reason"]);
    for words in ["the command exited with code 3", "the disk is on fire", "attempt 2 of 2"] {
        assert!(reason.contains(words), "{reason}");
    }
    assert_eq!(
        view["exec"],
        serde_json::json!({ "restarts": 1, "attempts": 2, "artifact": null, "exits": [{ "rank": 0, "code": 3, "signal": null }] })
    );
    assert_eq!(folder.read("tries-0").as_deref(), Some("0\n1\n"));
    let at_once = folder.submit(cluster, &format!("{}\nfail_on = [2]", shell("exit 2")), "ranks = 2");
    let view = cluster.wait_for_state(&at_once, "failed");
    assert!(text(&view["reason"]).contains("code 2, which fail_on names"), "{view:#}");
    assert_eq!(view["exec"]["restarts"], 0, "{view:#}");
    let missing = folder.submit(cluster, "command = [\"/no/such/program\"]", "ranks = 1\n[restart]\nattempts = 1");
    let view = cluster.wait_for_state(&missing, "failed");
    assert!(text(&view["reason"]).contains("start \"/no/such/program\""), "{view:#}");
}

#[test]
fn what_a_command_prints_is_read_whole_and_moves_no_terminal_of_others() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let prints = r#"seq 1 20000; yes "" | head -n 20000; echo the end; printf "\033[2Jgone\007\n" >&2; exit 3"#;
    let job = folder.submit(cluster, &format!("{}\nfail_on = [3]", shell(prints)), "ranks = 1");
    let reason = text(&cluster.wait_for_state(&job, "failed")["reason"]);
    assert!(reason.contains("[2Jgone") && !reason.contains(['\u{1b}', '\u{7}']), "{reason:?}");
    let printed = logs(cluster, &job);
    assert!(printed.contains("20000") && printed.contains("the end"), "{} bytes", printed.len());
    assert!(printed.lines().count() > 40_000, "{} lines", printed.lines().count());
}

/// A process in a session of its own, behind a parent that is gone; both it and the command pay no heed to SIGTERM.
const STUBBORN: &str = r#"
trap '' TERM
setsid sh -c 'trap "" TERM; (sleep 1000; true) & echo $! > $SHARED/hidden-$RANK' &
(sleep 1000; true) & wait
"#;

#[test]
fn a_cancelled_command_leaves_no_process_however_stubborn() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let job = folder.submit(cluster, &format!("{}\ngrace = \"500ms\"", shell(STUBBORN)), "ranks = 2");
    let hidden = [folder.pid("hidden-0"), folder.pid("hidden-1")];
    assert!(hidden.iter().all(|pid| is_there(*pid)));
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
    assert_eq!(folder.processes(), [0; 0]);
}

#[test]
fn a_command_has_its_grace_to_end_well() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let careful = "trap 'sleep 0.3; echo stored > $SHARED/stored; exit 0' TERM; echo $$ > $SHARED/pid; while true; do sleep 0.05; done";
    let job = folder.submit(cluster, &shell(careful), "ranks = 1");
    folder.wait_for("pid");
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
    assert_eq!(folder.read("stored").as_deref(), Some("stored\n"));
}

#[test]
fn nothing_is_left_of_a_command_whose_rank_is_killed() {
    let (cluster, folder) = (Cluster::start(1), Folder::new());
    let job = folder.submit(&cluster, &format!("{}\ngrace = \"100ms\"", shell(STUBBORN)), "ranks = 1");
    let hidden = folder.pid("hidden-0");
    std::fs::remove_file(folder.path("hidden-0")).expect("removed");
    signal(rank_on(&cluster.dir().join("node-1")), Signal::KILL);
    // The next one starts when nothing is left of the one before.
    let next = folder.pid("hidden-0");
    assert!(!is_there(hidden) && is_there(next));
    cluster.run(&["cancel", &job]).expect(0);
    cluster.wait_for_state(&job, "cancelled");
    assert_eq!(folder.processes(), [0; 0]);
}

const UNTIL_TOLD: &str = "echo $$ >> $SHARED/pid-$RANK; until [ -e $SHARED/go ]; do sleep 0.05; done; echo went";

#[test]
fn a_command_goes_on_without_its_agent_and_without_the_coordinator() {
    let (cluster, folder) = (Cluster::start(2), Folder::new());
    let job = folder.submit(&cluster, &shell(UNTIL_TOLD), "ranks = 2");
    let pids = [folder.pid("pid-0"), folder.pid("pid-1")];
    for process in ["node-2", "coordinator"] {
        let killed = process_of(cluster.dir(), process);
        signal(killed, Signal::KILL);
        poll("another one", || Some(process_of(cluster.dir(), process)).filter(|pid| *pid != killed));
    }
    poll("the rank is taken over", || {
        let log = cluster.run(&["logs", &job]).stdout;
        log.contains("another agent is there").then_some(())
    });
    folder.write("go", "");
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&view["generation"], &view["exec"]["restarts"]), (&1.into(), &0.into()), "{view:#}");
    for (rank, pid) in pids.into_iter().enumerate() {
        assert_eq!(folder.read(&format!("pid-{rank}")), Some(format!("{pid}\n")), "it was started again");
    }
    assert_eq!(logs(&cluster, &job).matches("went").count(), 2);
}

#[test]
fn an_elastic_gang_goes_on_with_the_ranks_that_are_left_and_grows_again() {
    let (cluster, folder) = (Cluster::start(2), Folder::new());
    let elastic = "echo $WORLD_SIZE/$TORCHELASTIC_RESTART_COUNT >> $SHARED/worlds-$RANK; until [ -e $SHARED/go ]; do sleep 0.05; done";
    let job = folder.submit(
        &cluster,
        &format!("{}\ngather = \"100ms\"", shell(elastic)),
        "ranks = 2\nranks_min = 1\ncpus = 2",
    );
    let worlds = || folder.read("worlds-0").unwrap_or_default();
    poll("two ranks", || (worlds() == "2/0\n").then_some(()));
    // Nobody starts the node again for now.
    signal(cluster.supervisor(), Signal::STOP);
    let (agent, rank) = (process_of(cluster.dir(), "node-2"), rank_on(&cluster.dir().join("node-2")));
    signal(agent, Signal::KILL);
    signal(rank, Signal::KILL);
    poll("one rank", || (worlds() == "2/0\n1/1\n").then_some(()));
    signal(cluster.supervisor(), Signal::CONT);
    poll("two ranks again", || (worlds() == "2/0\n1/1\n2/1\n").then_some(()));
    folder.write("go", "");
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!(view["exec"]["restarts"], 1, "{view:#}");
}

/// `stoke submit` of a spec in a folder that is taken along, and what it says.
fn submitted(cluster: &Cluster, folder: &Folder) -> (String, String) {
    let shared = folder.0.path().display();
    let spec = folder.write(
        "job.toml",
        &format!(
            "name = \"taken\"\n[exec]\ncommand = [\"./run.sh\"]\nfolder = \"code\"\nenv = {{ SHARED = \"{shared}\" }}\n[resources]\nranks = 2\nmemory = \"64MiB\"\n"
        ),
    );
    let ended = cluster.run(&["submit", &spec]).expect(0);
    (ended.stdout.trim().to_owned(), ended.stderr)
}

#[test]
fn a_folder_is_sent_once_and_each_start_finds_it_fresh() {
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    std::fs::create_dir_all(folder.path("code/sub")).expect("folders");
    folder.write(
        "code/run.sh",
        "#!/bin/sh\ncat sub/data >> $SHARED/found-$RANK\necho changed > sub/data\nls -A >> $SHARED/names-$RANK\n",
    );
    folder.write("code/sub/data", "as it was\n");
    folder.write("code/left.out", "large");
    folder.write("code/.stokeignore", "*.out\n");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path("code/run.sh"), executable).expect("mode");
    let (first, said) = submitted(cluster, &folder);
    assert!(said.contains("sending the folder"), "{said}");
    let view = cluster.wait_for_state(&first, "succeeded");
    let artifact = text(&view["exec"]["artifact"]);
    assert!(artifact.starts_with("blake3:"), "{view:#}");
    // Again, later, from a folder with other times.
    folder.write("code/sub/data", "as it was\n");
    let (second, said) = submitted(cluster, &folder);
    assert!(!said.contains("sending"), "{said}");
    let view = cluster.wait_for_state(&second, "succeeded");
    assert_eq!(view["exec"]["artifact"], artifact.as_str());
    for rank in 0..2 {
        assert_eq!(folder.read(&format!("found-{rank}")).as_deref(), Some("as it was\nas it was\n"));
        assert_eq!(folder.read(&format!("names-{rank}")).as_deref(), Some(&*".stokeignore\nrun.sh\nsub\n".repeat(2)));
    }
    // By its name alone; and one that nobody has.
    let named = format!("command = [\"./run.sh\"]\nartifact = \"{artifact}\"");
    let third = folder.submit(cluster, &named, "ranks = 1");
    cluster.wait_for_state(&third, "succeeded");
    let unknown = folder.spec(&format!("command = [\"a\"]\nartifact = \"blake3:{}\"", "7".repeat(64)), "");
    cluster.run(&["submit", &unknown]).expect(3).says(&["does not have the artifact blake3:7777"]);
    let missing = folder.spec("command = [\"a\"]\nfolder = \"none\"", "");
    cluster.run(&["submit", &missing]).expect(2).says(&["job.toml:4", "there is no folder"]);
}

#[test]
fn a_command_runs_on_a_throwaway_cluster() {
    let folder = Folder::new();
    let spec = folder.spec(&shell("echo out of $WORLD_SIZE; exit 0"), "ranks = 2");
    let run = |spec: &str| -> Ended {
        let mut command = stoke(["run", "--json", "--nodes", "2", "--out"]);
        command.arg(folder.path("out")).arg(spec);
        crate::harness::Background::start(command).wait()
    };
    let summary = run(&spec).expect(0).says(&["[rank-0] out of 2", "[rank-1] out of 2"]).json();
    assert_eq!(
        (&summary["state"], summary["exec"]["exits"].as_array().map(Vec::len)),
        (&"succeeded".into(), Some(2)),
        "{summary:#}"
    );
    std::fs::remove_dir_all(folder.path("out")).expect("removed");
    let spec = folder.spec(&shell("echo no luck >&2; exit 7"), "ranks = 1\n[restart]\nattempts = 1");
    let failed = run(&spec).expect(1).says(&["no luck", "exited with code 7"]);
    assert_eq!(failed.json()["exec"]["exits"][0]["code"], 7);
}

#[test]
fn a_wrong_command_is_refused_with_its_line() {
    let folder = Folder::new();
    for (exec, words) in [
        ("command = []", "job.toml:3: command is empty"),
        ("command = \"python3 train.py\"", "job.toml:3: command is one text: write a list"),
        ("command = [\"a\"]\nuser = \"a b\"", "job.toml:4: user = \"a b\": name a user of the nodes"),
        ("command = [\"a\"]\npass_env = [\"A=B\"]", "job.toml:4: pass_env: \"A=B\" is no name of a variable"),
        ("command = [\"a\"]\nfolders = \".\"", "job.toml:4: unknown field `folders`"),
    ] {
        let spec = folder.spec(exec, "");
        crate::harness::run(["submit", &spec]).expect(2).says(&[words]);
    }
}

#[test]
fn a_command_runs_as_the_user_that_it_names_and_as_nobody_else() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let (cluster, folder) = (Cluster::shared(), Folder::new());
    let mode = |bits| std::os::unix::fs::PermissionsExt::from_mode(bits);
    std::fs::set_permissions(folder.0.path(), mode(0o777)).expect("mode");
    let who = "id -un > $SHARED/who; echo $HOME >> $SHARED/who; touch mine $TMPDIR/too && echo owns >> $SHARED/who; \
               cd ..; mv work moved 2> /dev/null || echo keeps >> $SHARED/who; echo done >> $SHARED/who";
    let job = folder.submit(cluster, &format!("{}\nuser = \"nobody\"", shell(who)), "ranks = 1");
    cluster.wait_for_state(&job, "succeeded");
    // A link in the place of its folder would lead root, which makes the next one, anywhere.
    assert_eq!(folder.read("who").as_deref(), Some("nobody\n/nonexistent\nowns\nkeeps\ndone\n"));
    let job = folder.submit(
        cluster,
        &format!("{}\nuser = \"no-such-user\"", shell("true")),
        "ranks = 1\n[restart]\nattempts = 1",
    );
    let view = cluster.wait_for_state(&job, "failed");
    assert!(text(&view["reason"]).contains("this node has no such user"), "{view:#}");
}

/// The interpreter of `jobs/reference/setup.sh`.
fn torch() -> Option<PathBuf> {
    let python = std::env::home_dir()?.join(".cache/stoke-torch/bin/python");
    if python.exists() {
        return Some(python);
    }
    // Past the capture of the test runner: nobody should take this for a test that was done.
    let told =
        std::io::Write::write_all(&mut std::io::stderr(), b"not tested with PyTorch: run jobs/reference/setup.sh\n");
    told.expect("stderr");
    None
}

/// The script of `jobs/examples/torch-ddp`, as it is, with a snapshot in the job's folder.
fn submit_torch(cluster: &Cluster, folder: &Folder, python: &Path) -> String {
    let code = crate::harness::root().join("jobs/examples/torch-ddp");
    let snapshot = folder.path("snapshot.pt");
    let spec = format!(
        "name = \"torch\"\n[exec]\ncommand = [{python:?}, \"train.py\", \"--epochs\", \"40\", \"--snapshot\", {snapshot:?}]\n\
         folder = {code:?}\n[resources]\nranks = 2\nmemory = \"2GiB\"\n"
    );
    text(&cluster.json(&["submit", &folder.write("torch.toml", &spec)])["job"])
}

#[test]
fn a_script_for_torchrun_runs_as_it_is_is_killed_and_goes_on_from_its_snapshot() {
    let Some(python) = torch() else { return };
    let (cluster, folder, calm) = (Cluster::start(2), Folder::new(), Folder::new());
    let job = submit_torch(&cluster, &folder, &python);
    // Its epochs are short: looked for in the folder, at the first of them, or the kill might find a job that has ended.
    poll("the first snapshot", || folder.path("snapshot.pt").exists().then_some(()));
    let trainers = processes_with(&format!("STOKE_JOB={job}"));
    let of_rank_1 = |pid: &&u32| {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        String::from_utf8_lossy(&environment).contains("\0RANK=1\0")
    };
    signal(*trainers.iter().find(of_rank_1).expect("rank 1 trains"), Signal::KILL);
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!(view["exec"]["restarts"], 1, "{view:#}");
    let log = logs(&cluster, &job);
    assert!(log.contains("rank 0 goes on at epoch") && log.contains("restart 1"), "{log}");
    let weights = |log: &str| log.lines().find_map(|line| line.split_once("weights ").map(|(_, hash)| hash.to_owned()));
    let undisturbed = submit_torch(&cluster, &calm, &python);
    cluster.wait_for_state(&undisturbed, "succeeded");
    assert_eq!(weights(&log), weights(&logs(&cluster, &undisturbed)));
    assert!(weights(&log).is_some(), "{log}");
}

#[test]
fn a_rank_of_a_drained_node_moves_and_the_others_begin_anew_with_it() {
    let (cluster, folder) = (Cluster::start(3), Folder::new());
    let exec = format!("{}\ngather = \"0ms\"", shell(UNTIL_TOLD));
    let job = folder.submit(&cluster, &exec, "ranks = 2\ncpus = 2");
    let before = [folder.pid("pid-0"), folder.pid("pid-1")];
    let node = text(&cluster.job(&job)["placement"][1]["node"]);
    cluster.run(&["drain", &node]).expect(0);
    let both = || (0..2).all(|rank| folder.read(&format!("pid-{rank}")).is_some_and(|pids| pids.lines().count() >= 2));
    poll("both commands to begin again", || both().then_some(()));
    assert!(before.into_iter().all(|pid| !is_there(pid)));
    folder.write("go", "");
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!((&view["recoveries"], &view["exec"]["restarts"]), (&0.into(), &0.into()), "{view:#}");
    assert!(
        view["placement"].as_array().is_some_and(|places| places.iter().all(|place| place["node"] != node.as_str()))
    );
}

#[test]
fn a_command_that_is_cut_off_for_longer_than_it_may_be_is_ended() {
    let (cluster, folder) = (Cluster::start(1), Folder::new());
    let job = folder.submit(&cluster, &format!("{}\ncut_off = \"1s\"", shell(UNTIL_TOLD)), "ranks = 1");
    let pid = folder.pid("pid-0");
    let coordinator = process_of(cluster.dir(), "coordinator");
    signal(coordinator, Signal::STOP);
    poll("the end of the command", || (!is_there(pid)).then_some(()));
    folder.write("go", "");
    signal(coordinator, Signal::CONT);
    let view = cluster.wait_for_state(&job, "succeeded");
    assert_eq!(view["exec"]["restarts"], 1, "{view:#}");
    let explained = cluster.run(&["explain", &job]).expect(0).stdout;
    assert!(explained.contains("out of reach for longer than cut_off"), "{explained}");
}
