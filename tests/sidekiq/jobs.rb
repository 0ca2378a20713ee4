# The Ruby side of the tests: the same job names as Python's, so that either may take any job.
require "sidekiq"

url = { url: ENV.fetch("REDIS_URL") }
Sidekiq.strict_args!
Sidekiq.configure_client { |config| config.redis = url }
Sidekiq.configure_server do |config|
  config.redis = url
  config.options[:poll_interval_average] = 1 # seconds between looks for due jobs
end

class Count
  include Sidekiq::Worker
  sidekiq_options queue: "shared"

  def perform(side, n)
    Sidekiq.redis { |r| r.pipelined { |p| p.hincrby("ran:#{side}", n, 1); p.incr("ran by ruby") } }
  end
end

# Fails in the runs that its arguments name, wherever they happen.
class Flaky
  include Sidekiq::Worker
  sidekiq_options queue: "flaky", retry: 5, backtrace: 3

  def perform(fails)
    run = Sidekiq.redis { |r| r.rpush("flaky:runs", "ruby") }
    raise ArgumentError, "Ümläut 'no' #{run}" if run <= fails
  end
end

class Doze
  include Sidekiq::Worker
  sidekiq_options queue: "shared"

  def perform(seconds)
    sleep seconds
    Sidekiq.redis { |r| r.incr("dozed") }
  end
end
